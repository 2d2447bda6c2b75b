"""Who computes what in the next step: iteration-level batching under a token budget and a block budget.

    add ──▶ waiting ──admit──▶ running ──finish──▶ gone
               ▲                 │  │
               └────preempt──────┘  └──hold──▶ held ──▶ gone             (prefill role)
    reserve ──▶ reserved ──activate──▶ ready ──▶ running                 (decode role: KV comes from elsewhere)

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

Iteration-level scheduling is Orca's idea, chunked prefill beside decodes Sarathi-Serve's, preemption by recompute vLLM's.
Neighbours: `engine.engine` calls and applies, `engine.block_manager` counts blocks. No clock, no tensors, no I/O.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator

from core.errors import ContextLengthExceeded, EngineFault, Overloaded
from engine.block_manager import BlockManager
from engine.plan import Scheduled, StepPlan
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
        """A snapshot of the sequences that run, or could but for `max_num_seqs`."""
        return [*list(self._running), *list(self._ready.values())]

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
        """The KV of a reserved sequence arrived: it may decode. Raises EngineFault if it is not reserved."""
        if self._reserved.get(sequence.sequence_id) is not sequence:
            raise EngineFault(f"sequence {sequence.sequence_id} has no reservation to start from")
        del self._reserved[sequence.sequence_id]
        self._ready[sequence.sequence_id] = sequence
        self._stalled = False
        self._promote()

    def hold(self, sequence: Sequence) -> None:
        """Take a running sequence out of the batch and keep its blocks."""
        self._running.remove(sequence)
        sequence.status = Status.HELD
        self._held[sequence.sequence_id] = sequence

    def remove(self, sequence: Sequence, keep_cached: bool = True) -> None:
        """End a sequence in whatever state it is and free its blocks; see `BlockManager.free` for `keep_cached`."""
        name = sequence.sequence_id
        if sequence.status is Status.RUNNING:
            self._running.remove(sequence)
        elif not self._waiting.remove(name):
            for queue in (self._ready, self._reserved, self._held):
                queue.pop(name, None)
        self._arrivals.pop(name, None)
        self.blocks.free(sequence, keep_cached)
        sequence.status = Status.FINISHED
        self._stalled = False

    # --- the step -----------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """Decide one step, and allocate what it needs. None if nothing can be computed now: no work, or every block is
        kept for a transfer."""
        preempted = self._form_batch()
        scheduled: list[Scheduled] = []
        budget = self._max_num_batched_tokens
        prefills: list[Sequence] = []
        for sequence in self._running:
            start = sequence.computed_tokens
            if len(sequence.tokens) - start == 1:
                scheduled.append(Scheduled(sequence, start, 1, True))
                budget -= 1
            else:
                prefills.append(sequence)
        for sequence in prefills:
            budget -= self._schedule_chunk(sequence, budget, scheduled)
        if not preempted:
            self._admit(budget, scheduled)
        self._stalled = not scheduled and not preempted
        return StepPlan(tuple(scheduled), tuple(preempted)) if scheduled else None

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
            if not 0 <= sequence.computed_tokens <= min(len(sequence.tokens), len(sequence.blocks) * self.blocks.block_size):
                wrong.append(f"{sequence.sequence_id} has {sequence.computed_tokens} computed tokens in {sequence.blocks}")
        wrong += [f"{sequence.sequence_id} waits with blocks" for sequence in self._waiting if sequence.blocks]
        if self._waiting.tokens != sum(len(sequence.tokens) for sequence in self._waiting):
            wrong.append(f"{self._waiting.tokens} waiting tokens are counted wrongly")
        return wrong

    def _schedule_chunk(self, sequence: Sequence, budget: int, scheduled: list[Scheduled]) -> int:
        count = min(budget, sequence.uncomputed_tokens)
        if count > 0:
            start = sequence.computed_tokens
            scheduled.append(Scheduled(sequence, start, count, start + count == len(sequence.tokens)))
        return count

    def _promote(self) -> None:
        while self._ready and len(self._running) < self._max_num_seqs:
            name = next(iter(self._ready))
            self._run(self._ready.pop(name))

    def _admit(self, budget: int, scheduled: list[Scheduled]) -> None:
        while budget > 0 and len(self._running) < self._max_num_seqs:
            sequence = self._waiting.head()
            if sequence is None or not self.blocks.allocate(sequence, self._watermark()):
                return
            self._waiting.pop()
            if sequence.preemptions == 0:
                sequence.cached_tokens = sequence.computed_tokens
            self._run(sequence)
            budget -= self._schedule_chunk(sequence, budget, scheduled)

    def _form_batch(self) -> list[Sequence]:
        """Fill the batch with those who are ready, and find room for the next token of everyone who decodes. Returns the
        preempted."""
        self._promote()
        preempted = self._grow_running()
        while self._ready and not self._running:  # those who ran gave way to earlier arrivals
            self._promote()
            preempted += self._grow_running()
        return preempted

    def _grow_running(self) -> list[Sequence]:
        """Oldest first, at the cost of the latest."""
        preempted: list[Sequence] = []
        size, index = self.blocks.block_size, 0
        while index < len(self._running):
            sequence = self._running[index]
            if len(sequence.tokens) <= len(sequence.blocks) * size or self.blocks.grow(sequence):
                index += 1
            else:
                preempted.append(self._preempt())
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
        for queue in (self._ready, self._reserved, self._held):
            yield from queue.values()
