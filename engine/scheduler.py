"""Who computes what in the next step: iteration-level batching under a token budget and a block budget.

    add ──▶ waiting ──admit──▶ running ──retire──▶ leaving ──finish──▶ gone
               ▲                 │                    │
               └────preempt──────┘                    └──hold──▶ held ──▶ gone             (prefill role)
    reserve ──▶ reserved ──activate──▶ ready ──▶ running                                   (decode role: KV comes from elsewhere)

Each step takes first the sequences that decode, then further chunks of prompts under way, then new prompts, oldest first.

Invariants:
- Admission allocates blocks for *all* tokens that a sequence has, so only decoding grows, by one block at a time. A sequence
  with `hold` never decodes and so never grows.
- When blocks run out, whoever arrived last among running and ready gives up its blocks and is recomputed later, in its old
  place in the queue. The oldest therefore always advances. Never preempted: `hold`, held and reserved, whose blocks a
  transfer may be using.
- The head of the queue is never overtaken: what does not fit yet blocks what came later, so a large prompt cannot starve.
  `reserve` too yields to a head that arrived earlier.
- Admission leaves a few blocks (the watermark) for those that decode, so that it does not cause the next preemption.
- What can never fit is refused at the door, so nothing that waits waits for ever, given that whoever holds or reserves
  ends it at some time.
- Every running sequence gets at least one token a step: no more run than there are tokens in the budget.
- Steps are decided before the tokens of earlier ones are known (`Sequence.pending_tokens`). Whoever has its last token drawn
  leaves the batch at once, so that no step computes past it. Nobody is preempted while steps are in flight.

Iteration-level scheduling is Orca's idea, chunked prefill beside decodes Sarathi-Serve's, preemption by recompute vLLM's.
Neighbours: `engine.engine` calls and applies, `engine.block_manager` counts blocks. No clock, no tensors, no I/O.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable, Iterator

from core.errors import ContextLengthExceeded, EngineFault, Overloaded
from engine.block_manager import BlockManager
from engine.decision import Decision, Part
from engine.sequence import Sequence, Status
from engine.waiting_queue import OrderKey, WaitingQueue

WATERMARK_SHARE = 100
"""One block in this many is kept back at admission."""


class Scheduler:
    """Queues of one engine, and the decision of each step. Sequence ids are unique among its members.

    Args:
        max_num_seqs: most sequences in one step; lowered to `max_num_batched_tokens`, so that each gets a token.
        max_num_batched_tokens: most tokens in one step.
        max_waiting_tokens: most tokens that may wait; an empty queue takes any sequence.
        watermark_blocks: blocks that admission leaves free while others may grow; by default 1 % of all, at least one.
        key: order of admission before arrival; see `WaitingQueue`.
    """

    def __init__(
        self,
        blocks: BlockManager,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_waiting_tokens: int,
        *,
        watermark_blocks: int | None = None,
        key: OrderKey | None = None,
    ) -> None:
        if max_num_seqs < 1 or max_num_batched_tokens < 1:
            raise ValueError(f"Got {max_num_seqs = }, {max_num_batched_tokens = } but expected at least one of each")
        self.blocks = blocks
        self._max_num_seqs = min(max_num_seqs, max_num_batched_tokens)
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_waiting_tokens = max_waiting_tokens
        self._watermark_blocks = max(1, blocks.num_blocks // WATERMARK_SHARE) if watermark_blocks is None else watermark_blocks
        self._waiting = WaitingQueue(key)
        self._running: list[Sequence] = []
        self._ready: dict[str, Sequence] = {}
        self._reserved: dict[str, Sequence] = {}
        self._held: dict[str, Sequence] = {}
        self._leaving: dict[str, Sequence] = {}
        self._arrivals: dict[str, int] = {}
        self._next_arrival = 0
        self._stalled = False

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
        return not self._stalled and bool(self._running or self._ready or len(self._waiting))

    def active(self) -> list[Sequence]:
        """A snapshot of the sequences that run, or could but for `max_num_seqs`, or have their last token drawn."""
        return [*list(self._running), *list(self._leaving.values()), *list(self._ready.values())]

    def pinned(self) -> list[Sequence]:
        """A snapshot of the sequences whose blocks are kept for a transfer: held and reserved."""
        return [*list(self._held.values()), *list(self._reserved.values())]

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
        self._waiting.push(sequence, self._arrive(sequence))
        self._stalled = False

    def reserve(self, sequence: Sequence) -> bool:
        """Give a sequence blocks for all its tokens, whose KV will come from elsewhere. False if there is no room now.

        Raises ContextLengthExceeded if there never will be.
        """
        self._check_fits(sequence)
        head = self._waiting.head()
        owed = self.blocks.blocks_for(len(head.tokens)) if head is not None and head.arrived_s <= sequence.arrived_s else 0
        if not self.blocks.allocate(sequence, self._watermark() + owed):
            return False
        sequence.cached_tokens = sequence.computed_tokens
        self._arrive(sequence)
        self._reserved[sequence.sequence_id] = sequence
        return True

    def activate(self, sequence: Sequence) -> None:
        """The KV of all tokens of a reserved sequence arrived: it may decode. Raises EngineFault if it is not reserved."""
        if self._reserved.get(sequence.sequence_id) is not sequence:
            raise EngineFault(f"sequence {sequence.sequence_id} has no reservation to start from")
        del self._reserved[sequence.sequence_id]
        sequence.computed_tokens = sequence.launched_tokens = len(sequence.tokens)
        self._ready[sequence.sequence_id] = sequence
        self._stalled = False
        self._promote()

    def hold(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch and keep its blocks."""
        self._leave(sequence)
        sequence.status = Status.HELD
        self._held[sequence.sequence_id] = sequence

    def remove(self, sequence: Sequence, keep_cached: bool = True) -> None:
        """End a sequence in whatever state it is and free its blocks; see `BlockManager.free` for `keep_cached`."""
        name = sequence.sequence_id
        if sequence.status is Status.RUNNING:
            self._leave(sequence)
        elif not self._waiting.remove(name):
            for queue in (self._ready, self._reserved, self._held):
                queue.pop(name, None)
        self._arrivals.pop(name, None)
        self.blocks.free(sequence, keep_cached)
        sequence.status = Status.FINISHED
        self._stalled = False

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
        for sequence in self._running:
            if sequence.unlaunched_tokens == 1:
                parts.append(Part(sequence, sequence.launched_tokens, 1, True))
                budget -= 1
            else:
                prefills.append(sequence)
        for sequence in prefills:
            budget -= self._schedule_chunk(sequence, budget, parts)
        if not preempted:
            self._admit(budget, parts)
        self._stalled = not parts and not preempted
        return Decision(tuple(parts), tuple(preempted)) if parts else None

    def retire(self, sequences: Iterable[Sequence]) -> None:
        """Take running sequences whose last token is being drawn out of the batch. They keep their blocks until that token is
        known, and then go or are held."""
        leaving = {sequence.sequence_id: sequence for sequence in sequences}
        self._leaving.update(leaving)
        self._running = [sequence for sequence in self._running if sequence.sequence_id not in leaving]

    def collected(self, step: int) -> None:
        """All steps up to this one are done: what cooled until then is free."""
        self.blocks.collected(step)
        self._stalled = False

    def check(self) -> list[str]:
        """Every violated invariant, in words: of the queues and of the blocks."""
        members = list(self._members())
        names = [sequence.sequence_id for sequence in members]
        wrong = self.blocks.check(members)
        if len(set(names)) != len(names) or set(names) != set(self._arrivals):
            wrong.append(f"members {sorted(names)} are not the arrivals {sorted(self._arrivals)}, each once")
        if len(self._running) > self._max_num_seqs:
            wrong.append(f"{len(self._running)} sequences run but {self._max_num_seqs} may")
        for sequence in members:
            room = min(sequence.total_tokens, len(sequence.blocks) * self.blocks.block_size)
            if not 0 <= sequence.computed_tokens <= sequence.launched_tokens <= room:
                counts = f"{sequence.computed_tokens} computed, {sequence.launched_tokens} launched tokens"
                wrong.append(f"{sequence.sequence_id} has {counts} in {sequence.blocks}")
        wrong += [f"{sequence.sequence_id} waits with blocks" for sequence in self._waiting if sequence.blocks]
        if self._waiting.tokens != sum(len(sequence.tokens) for sequence in self._waiting):
            wrong.append(f"{self._waiting.tokens} waiting tokens are counted wrongly")
        return wrong

    def _schedule_chunk(self, sequence: Sequence, budget: int, parts: list[Part]) -> int:
        count = min(budget, sequence.unlaunched_tokens)
        if count > 0:
            parts.append(Part(sequence, sequence.launched_tokens, count, count == sequence.unlaunched_tokens))
        return count

    def _promote(self) -> None:
        while self._ready and len(self._running) < self._max_num_seqs:
            name = next(iter(self._ready))
            self._run(self._ready.pop(name))

    def _admit(self, budget: int, parts: list[Part]) -> None:
        while budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._waiting.head()
            if sequence is None or not self.blocks.allocate(sequence, self._watermark()):
                return
            self._waiting.pop()
            if sequence.preemptions == 0:
                sequence.cached_tokens = sequence.computed_tokens
            self._run(sequence)
            budget -= self._schedule_chunk(sequence, budget, parts)

    def _form_batch(self, may_preempt: bool) -> list[Sequence] | None:
        """Fill the batch with those who are ready, and find room for the next token of everyone who decodes. Returns the
        preempted, or None if somebody must be who may not."""
        self._promote()
        preempted = self._grow_running(may_preempt)
        while preempted is not None and self._ready and not self._running:  # those who ran gave way to earlier arrivals
            self._promote()
            more = self._grow_running(may_preempt)
            preempted = None if more is None else preempted + more
        return preempted

    def _grow_running(self, may_preempt: bool) -> list[Sequence] | None:
        """Oldest first, at the cost of the latest."""
        preempted: list[Sequence] = []
        size, index = self.blocks.block_size, 0
        while index < len(self._running):
            sequence = self._running[index]
            if sequence.total_tokens <= len(sequence.blocks) * size or self.blocks.grow(sequence):
                index += 1
            elif may_preempt:
                preempted.append(self._preempt())
            else:
                return None
        return preempted

    def _preempt(self) -> Sequence:
        """Send the latest of those who may be sent back to the queue. One is there: whoever needs to grow."""
        victim = next(sequence for sequence in reversed(self._running) if not sequence.hold)
        if self._ready:
            victim = max(victim, *self._ready.values(), key=self._arrival)
        if victim.status is Status.RUNNING:
            self._running.remove(victim)
        else:
            del self._ready[victim.sequence_id]
        self.blocks.free(victim)
        victim.status = Status.WAITING
        victim.preemptions += 1
        self._waiting.push(victim, self._arrivals[victim.sequence_id])
        return victim

    def _run(self, sequence: Sequence) -> None:
        sequence.status = Status.RUNNING
        insort(self._running, sequence, key=self._arrival)

    def _leave(self, sequence: Sequence) -> None:
        if self._leaving.pop(sequence.sequence_id, None) is None:
            self._running.remove(sequence)

    def _watermark(self) -> int:
        grows = self._ready or self._reserved or any(not sequence.hold for sequence in self._running)
        return self._watermark_blocks if grows else 0

    def _check_fits(self, sequence: Sequence) -> None:
        # The last token is drawn but never computed.
        drawn = 0 if sequence.hold else max(0, sequence.sampling.max_tokens - sequence.output_tokens - 1)
        tokens = len(sequence.tokens) + drawn
        if self.blocks.blocks_for(tokens) > self.blocks.num_blocks:
            capacity_tokens = self.blocks.num_blocks * self.blocks.block_size
            raise ContextLengthExceeded(f"Got {tokens} tokens to keep but the KV cache holds {capacity_tokens}", "max_tokens")

    def _arrive(self, sequence: Sequence) -> int:
        self._next_arrival += 1
        self._arrivals[sequence.sequence_id] = self._next_arrival
        return self._next_arrival

    def _arrival(self, sequence: Sequence) -> int:
        return self._arrivals[sequence.sequence_id]

    def _members(self) -> Iterator[Sequence]:
        yield from self._waiting
        yield from self._running
        for queue in (self._ready, self._reserved, self._held, self._leaving):
            yield from queue.values()
