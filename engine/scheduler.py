"""Who gets blocks, and who computes what in the next step: iteration-level batching under a token budget and a block budget.

    add ──▶ waiting ──admit──▶ running ──retire──▶ leaving ──finish──▶ gone
               ▲                 │                    │
               └──── preempt ────┘                    └──hold──▶ held ──▶ gone               (prefill role)
    reserve ──▶ waiting ──admit──▶ reserved ──activate──▶ ready ──▶ running                   (decode role: KV comes in)

Each step takes first the sequences that decode, then further chunks of prompts under way, then new prompts, oldest first. Age is
that of the request in the cluster, the same on every engine (`waiting_queue.Order`).

Invariants:
- Prompts and reservations wait in one queue. Admission gives blocks for *all* tokens that a sequence has, so only decoding
  grows, by one block at a time. A sequence with `hold` never decodes and so never grows. Layers with windows take theirs as steps
  are decided, out of what was promised before, and never lack any (`engine.promises`).
- Admission keeps room for the output of all who write here (`engine.room`). So nobody is preempted for want of blocks while
  outputs are no longer than that.
- Nobody is overtaken for blocks: what does not fit yet blocks all that is younger, so a large claim cannot starve. A
  reservation needs no compute; it may pass prompts that wait only for a place in the batch, at most `MAX_PASSED` of them and only
  if blocks remain for every one of them, and for their output, as if the prefix cache had nothing.
- When blocks run out under those who decode, the youngest gives up its blocks and is recomputed later, in its old place in the
  queue. The oldest therefore always advances.
- Wound-wait: a `hold` prompt keeps blocks here until another engine has room for it, which may be waiting for room here. So while
  it is not pinned it may lose them to an older claim: to one who grows, or to the head of the queue when nobody here is left who
  will free blocks by himself. Reservations and the pinned never lose theirs: a transfer is using them, and ends.
- What can never fit is refused at the door. So nothing waits for ever (docs/adr/0012), given that transfers end at some time.
- Every sequence that decodes gets its token in each step: no more run than there are tokens in the budget.
- Steps are decided before the tokens of earlier ones are known (`Sequence.pending_tokens`). Whoever has its last token drawn
  leaves the batch at once, so that no step computes past it. Nobody loses blocks while steps are in flight.

Iteration-level scheduling is Orca's idea, chunked prefill beside decodes Sarathi-Serve's, preemption by recompute vLLM's;
wound-wait is that of Rosenkrantz, Stearns and Lewis (1978). Neighbours: `engine.engine` calls and applies, `engine.block_manager`
counts blocks. No clock, no tensors, no I/O.
"""

from __future__ import annotations

from collections.abc import Iterable

from core.errors import ContextLengthExceeded, EngineFault, Overloaded
from engine.admission import Admission, AdmissionKind
from engine.block_manager import BlockManager
from engine.decision import Decision, Part
from engine.residents import Residents
from engine.room import Room
from engine.sequence import Sequence, Status
from engine.waiting_queue import Order, WaitingQueue, order_of

MAX_PASSED = 64
"""Prompts waiting for compute that one reservation may pass."""


class Scheduler:
    """Queues of one engine, and the decision of each step. Sequence ids are unique among its members.

    Args:
        max_num_seqs: most sequences in one step; lowered to `max_num_batched_tokens`, so that each gets a token.
        max_num_batched_tokens: most tokens in one step.
        max_waiting_tokens: most tokens that may wait when a prompt is added; an empty queue takes any.
        headroom_tokens: output of each sequence that writes here for which admission keeps room.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting_tokens: int,
        headroom_tokens: int,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError(f"Got {max_num_seqs = }, {max_num_batched_tokens = } but expected at least one of each")
        self.blocks = blocks
        self._growing = next(iter(blocks.windows.full), 0)  # a group whose tables tell when it is time to grow
        self._room = Room(blocks, headroom_tokens)
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_waiting_tokens = max_waiting_tokens
        self._waiting = WaitingQueue()
        self._residents = Residents(self._order)
        self._orders: dict[str, Order] = {}
        self._next_arrival = 0
        self._admissions: list[Admission] = []
        self._stalled = False
        self.recomputed_tokens = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        return self._waiting.tokens

    @property
    def has_work(self) -> bool:
        """Whether `schedule` may find something to do. False also when it just found nothing, because all blocks are kept for
        transfers, and no sequence came or went since: calling it again would spin."""
        return not self._stalled and bool(self._residents.running or self._residents.ready or len(self._waiting))

    def active(self) -> list[Sequence]:
        """A snapshot of the sequences that run, or could but for `max_num_seqs`, or have their last token drawn."""
        return self._residents.active()

    def kept(self) -> list[Sequence]:
        """A snapshot of the sequences that only keep blocks for a transfer: held and reserved."""
        return self._residents.kept()

    # --- in and out ---------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence to be computed from its tokens.

        Raises:
            ContextLengthExceeded: it could not fit even alone.
            Overloaded: `max_waiting_tokens` would be exceeded.
        """
        self._check_fits(sequence)
        waiting_tokens = self._waiting.tokens + len(sequence.tokens)
        if len(self._waiting) and waiting_tokens > self._max_waiting_tokens:
            raise Overloaded(f"{self._waiting.tokens} tokens already wait, at most {self._max_waiting_tokens} may")
        self._enter(sequence)

    def reserve(self, sequence: Sequence) -> None:
        """Queue a sequence whose KV will come from elsewhere for blocks for all its tokens.

        Never refused because too much waits: its prompt is read elsewhere by now, and as many as are can come.

        Raises:
            ContextLengthExceeded: it could not fit even alone.
        """
        self._check_fits(sequence)
        sequence.incoming = True
        self._enter(sequence)

    def activate(self, sequence: Sequence) -> None:
        """The KV of all tokens of a granted sequence arrived: it may decode. Raises EngineFault if it has no grant."""
        if sequence.status is not Status.RESERVED or sequence.sequence_id not in self._orders:
            raise EngineFault(f"sequence {sequence.sequence_id} has no reservation to start from")
        self._residents.leave(sequence)
        sequence.computed_tokens = sequence.launched_tokens = len(sequence.tokens)
        sequence.incoming = False
        self._residents.enter(sequence, Status.READY)
        self._stalled = False
        self._promote()

    def hold(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch and keep its blocks."""
        self._residents.leave(sequence)
        self.blocks.settle(sequence)
        self._residents.enter(sequence, Status.HELD)

    def remove(self, sequence: Sequence, keep_cached: bool = True) -> None:
        """End a sequence in whatever state it is and free its blocks; see `BlockManager.free` for `keep_cached`."""
        if not self._waiting.remove(sequence.sequence_id):
            self._residents.leave(sequence)
        del self._orders[sequence.sequence_id]
        self._room.give_up(self._room.headroom(sequence))
        self.blocks.free(sequence, keep_cached)
        sequence.status = Status.FINISHED
        self._stalled = False

    # --- admission ----------------------------------------------------------------------------------------------------

    def admit(self, may_preempt: bool = True) -> None:
        """Grant reservations, for which no step is needed. `may_preempt` is False while steps are in flight."""
        self._admit(0, [], may_preempt)

    def take_admissions(self) -> tuple[Admission, ...]:
        """What happened since the last call to those who wait on two engines and still live, in order."""
        taken, self._admissions = self._admissions, []
        return tuple(admission for admission in taken if admission.sequence.status is not Status.FINISHED)

    def _admit(self, budget: int, parts: list[Part], may_preempt: bool) -> None:
        """Serve the queue from its head, with `budget` tokens left for prompts in the step that `parts` make up."""
        passed = passed_blocks = 0
        while (claim := self._waiting.at(passed)) is not None:
            if not claim.incoming and (budget <= 0 or len(self._residents.running) >= self._max_num_seqs):
                passed += 1
                passed_blocks += self._room.wanted(claim)
                if self._waiting.reservations == 0 or passed > MAX_PASSED or passed_blocks > self.blocks.available_blocks:
                    return
            elif self._take(claim, passed_blocks, may_preempt and passed == 0):
                budget -= self._enter_blocks(claim, budget, parts)
            else:
                return

    def _take(self, claim: Sequence, passed_blocks: int, may_wound: bool) -> bool:
        """Give a claim its blocks, if need be at the cost of younger prompts that nobody else has room for yet."""
        if self._room.take(claim, self._residents.writers(), passed_blocks):
            return True
        if not may_wound or not self._residents.stand_still():
            return False
        order = self._order(claim)
        younger = [sequence for sequence in self._residents.unpinned() if self._order(sequence) > order]
        wounded = self._room.made_by(claim, sorted(younger, key=self._order, reverse=True))
        for sequence in wounded:
            self._take_back(sequence)
        return bool(wounded) and self._room.take(claim, (), passed_blocks)

    def _enter_blocks(self, claim: Sequence, budget: int, parts: list[Part]) -> int:
        """A claim has its blocks. Returns how many tokens of it the next step computes."""
        self._waiting.remove(claim.sequence_id)
        self._stalled = False
        if claim.preemptions == 0:
            claim.cached_tokens = claim.computed_tokens
        if claim.incoming:
            self._residents.enter(claim, Status.RESERVED)
            self._admissions.append(Admission(AdmissionKind.GRANTED, claim))
            return 0
        self._residents.enter(claim, Status.RUNNING)
        if claim.hold:
            self._admissions.append(Admission(AdmissionKind.ADMITTED, claim))
        return self._schedule_chunk(claim, budget, parts)

    # --- the step -----------------------------------------------------------------------------------------------------

    def schedule(self, may_preempt: bool = True) -> Decision | None:
        """Decide one step, and allocate what it needs. None if nothing can be computed now: no work, or every block is
        kept for a transfer; or somebody would have to be preempted, and `may_preempt` is False because steps are in flight,
        whose end may make room."""
        preempted = self._form_batch(may_preempt)
        if preempted is None:
            return None
        parts: list[Part] = []
        budget = self._max_num_batched_tokens
        prefills: list[Sequence] = []
        for sequence in self._residents.running:
            if sequence.unlaunched_tokens == 1:
                parts.append(Part(sequence, sequence.launched_tokens, 1, True))
                budget -= 1
            else:
                prefills.append(sequence)
        for sequence in prefills:
            budget -= self._schedule_chunk(sequence, budget, parts)
        if not preempted:
            self._admit(budget, parts, may_preempt)
        if self.blocks.windowed:
            for part in parts:
                self.blocks.advance(part.sequence, part.start + part.count)
        self._stalled = not parts and not preempted
        return Decision(tuple(parts), tuple(preempted)) if parts else None

    def retire(self, sequences: Iterable[Sequence]) -> None:
        """Take running sequences whose last token is being drawn out of the batch. They keep their blocks until that token is
        known, and then go or are held."""
        self._residents.retire(sequences)

    def collected(self, step: int) -> None:
        """All steps up to this one are done: what cooled until then is free."""
        self.blocks.collected(step)
        self._stalled = False

    def check(self) -> list[str]:
        """Every violated invariant, in words: of the queues and of the blocks."""
        members = [*self._waiting, *self._residents]
        names = [sequence.sequence_id for sequence in members]
        wrong = self.blocks.check(members)
        if len(set(names)) != len(names) or set(names) != set(self._orders):
            wrong.append(f"members {sorted(names)} are not those that came, {sorted(self._orders)}, each once")
        if len(self._residents.running) > self._max_num_seqs:
            wrong.append(f"{len(self._residents.running)} sequences run but {self._max_num_seqs} may")
        for sequence in members:
            room = min([sequence.total_tokens, *[len(table) * self.blocks.block_size for table in sequence.tables]])
            if not 0 <= sequence.computed_tokens <= sequence.launched_tokens <= room:
                counts = f"{sequence.computed_tokens} computed, {sequence.launched_tokens} launched tokens"
                wrong.append(f"{sequence.sequence_id} has {counts} in {sequence.tables}")
        return wrong + self._residents.check() + self._waiting.check()

    def _schedule_chunk(self, sequence: Sequence, budget: int, parts: list[Part]) -> int:
        count = min(budget, sequence.unlaunched_tokens)
        if self.blocks.windowed:
            count = min(count, self.blocks.windows.chunk(sequence))
        if count > 0:
            parts.append(Part(sequence, sequence.launched_tokens, count, count == sequence.unlaunched_tokens))
        return count

    def _promote(self) -> None:
        residents = self._residents
        while residents.ready and len(residents.running) < self._max_num_seqs:
            sequence = next(iter(residents.ready.values()))
            residents.leave(sequence)
            residents.enter(sequence, Status.RUNNING)

    def _form_batch(self, may_preempt: bool) -> list[Sequence] | None:
        """Fill the batch with those who are ready, and find room for the next token of everyone who decodes. Returns the
        preempted, or None if somebody must be who may not."""
        self._promote()
        preempted = self._grow_running(may_preempt)
        residents = self._residents
        while preempted is not None and residents.ready and not residents.running:  # those who ran gave way to older ones
            self._promote()
            more = self._grow_running(may_preempt)
            preempted = None if more is None else preempted + more
        return preempted

    def _grow_running(self, may_preempt: bool) -> list[Sequence] | None:
        """Oldest first, at the cost of the youngest."""
        preempted: list[Sequence] = []
        group, size, index = self._growing, self.blocks.block_size, 0
        while index < len(self._residents.running):
            sequence = self._residents.running[index]
            if sequence.total_tokens <= len(sequence.tables[group]) * size or self.blocks.grow(sequence):
                index += 1
            elif may_preempt:
                preempted.append(self._preempt())
            else:
                return None
        return preempted

    def _preempt(self) -> Sequence:
        """Send the youngest of those who may lose their blocks back to the queue. One is there: whoever needs to grow."""
        victim = max((*self._residents.decoding(), *self._residents.unpinned()), key=self._order)
        self._take_back(victim)
        return victim

    def _take_back(self, victim: Sequence) -> None:
        self._residents.leave(victim)
        if victim.status is Status.HELD:
            victim.tokens.pop()  # kept in `first`; it is drawn and emitted again
        self._room.give_up(self._room.headroom(victim))
        self.recomputed_tokens += victim.computed_tokens
        self.blocks.free(victim)
        victim.status = Status.WAITING
        victim.preemptions += 1
        self._waiting.push(victim, self._order(victim))
        if victim.hold:
            self._admissions.append(Admission(AdmissionKind.TAKEN_BACK, victim))

    def _check_fits(self, sequence: Sequence) -> None:
        tokens = sequence.most_tokens
        blocks = self.blocks.kept_for(tokens) + self.blocks.windows.promise(sequence, tokens, decodes=False)
        if blocks > self.blocks.num_blocks:
            needed = f"{tokens} tokens to keep, in {blocks} blocks of {self.blocks.block_size}"
            raise ContextLengthExceeded(f"Got {needed}, but the KV cache has {self.blocks.num_blocks}", "max_tokens")

    def _enter(self, sequence: Sequence) -> None:
        self._next_arrival += 1
        order = self._orders[sequence.sequence_id] = order_of(sequence, self._next_arrival)
        self._waiting.push(sequence, order)
        self._stalled = False

    def _order(self, sequence: Sequence) -> Order:
        return self._orders[sequence.sequence_id]
