"""One model replica's step loop: schedule, run, apply.

Everything that can be known about a sequence beforehand is checked at the door (`add`, `reserve`), so that no request can
break the step that it shares with others. What goes wrong inside a step ends the sequences of that step, never the engine.

Tokens are emitted once, by the step that draws them. A sequence ends when `NewToken.finish` is set, or in
`StepOutput.failed`, or by `cancel`; with `hold` it goes to HELD with its first token, finished or not, and lives until
`release` or `cancel`.

Not thread-safe: one thread calls it, and only between steps; `load` alone may be called by any thread at any time.

Neighbours: `engine.scheduler` decides, a `ModelRunner` computes, the prefill and decode workers call. No tensors here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.clock import Clock
from core.config import EngineConfig
from core.errors import ContextLengthExceeded, EngineFault, HetServeError, InvalidRequest, ProtocolError
from core.layout import KVLayout
from core.request import FinishReason
from core.sampling import SamplingParams
from engine.block_manager import BlockManager
from engine.plan import Drawn, LayerListener, ModelRunner, Scheduled, StepPlan, StepResult
from engine.results import EngineLoad
from engine.scheduler import Scheduler
from engine.sequence import NewToken, Sequence, Status
from engine.waiting_queue import OrderKey

PlanLayerListener = Callable[[StepPlan, int], None]
"""Called during a step with its plan and the index of a layer whose new KV was just written."""


@dataclass(frozen=True)
class StepOutput:
    """What a step produced. `failed` sequences are freed already. `plan` is None if there was nothing to compute."""

    tokens: tuple[NewToken, ...] = ()
    failed: tuple[tuple[Sequence, HetServeError], ...] = ()
    plan: StepPlan | None = None


class Engine:
    """Sequences in, tokens out, one step at a time.

    `config` gives the limits; the sizes of the cache and the model are the runner's. `clock` stamps sequences; a caller
    stamps `arrived_s` by the same clock. `key` orders admission (see `WaitingQueue`).
    """

    def __init__(self, runner: ModelRunner, config: EngineConfig, clock: Clock, *, key: OrderKey | None = None) -> None:
        self._runner = runner
        self._clock = clock
        self._blocks = BlockManager(runner.num_blocks, runner.layout.block_size, config.prefix_cache)
        self._scheduler = Scheduler(
            self._blocks, config.max_num_seqs, config.max_num_batched_tokens, config.max_waiting_tokens, key=key
        )
        self._sequences: dict[str, Sequence] = {}
        self._steps = 0
        self._stepping = False
        self._alive_s = clock.now()

    @property
    def layout(self) -> KVLayout:
        return self._runner.layout

    @property
    def num_blocks(self) -> int:
        return self._blocks.num_blocks

    @property
    def max_model_len(self) -> int:
        return self._runner.max_model_len

    @property
    def has_work(self) -> bool:
        """Whether a step may compute something. A step that finds all blocks kept for transfers has the plan None, and then
        there is no work until a sequence comes, goes or starts: so `while has_work: step()` never spins."""
        return self._scheduler.has_work

    # --- in and out ---------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence to be read and continued here.

        Raises:
            ContextLengthExceeded: prompt and `max_tokens` exceed the model or the whole cache.
            InvalidRequest: a token id outside the vocabulary, nothing left to generate, or an id that is in use.
            Overloaded: too many tokens wait already.
        """
        self._check(sequence)
        self._wake()
        self._scheduler.add(sequence)
        self._sequences[sequence.sequence_id] = sequence

    def reserve(self, sequence: Sequence) -> bool:
        """Give a sequence blocks for all its tokens, whose KV will be written from outside, up to `start`.

        The first `cached_tokens` are here already. False, with nothing changed, if there is no room now: ask again after
        the next step. Raises what `add` raises, but never Overloaded.
        """
        if sequence.hold:
            raise ValueError(f"sequence {sequence.sequence_id} cannot be both reserved and held")
        self._check(sequence)
        if not self._scheduler.reserve(sequence):
            return False
        self._sequences[sequence.sequence_id] = sequence
        return True

    def start(self, sequence: Sequence, token: int) -> FinishReason | None:
        """All KV of a reserved sequence is in its blocks, and `token` was drawn from it elsewhere and delivered: decode on.

        `token` is not emitted again. Returns why the generation is over if that token ended it; the sequence is then freed.

        Raises:
            EngineFault: the sequence is not reserved here.
            ProtocolError: no such token. The reservation stays.
        """
        self._between_steps()
        if not 0 <= token < self._runner.vocab_size:
            raise ProtocolError(f"Got token {token} but the vocabulary ends at {self._runner.vocab_size}")
        self._wake()
        first_arrived = sequence.computed_tokens
        self._scheduler.activate(sequence)
        sequence.computed_tokens = len(sequence.tokens)
        self._blocks.register(sequence, first_arrived)
        finish, _ = self._append(sequence, token)
        if finish is not None:
            self._end(sequence)
        return finish

    def cancel(self, sequence_id: str) -> bool:
        """End a sequence in any state and free all it owns. False, and nothing else, if it is not (or no longer) here."""
        self._between_steps()
        self._wake()
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._end(sequence)
        return sequence is not None

    def release(self, sequence_id: str) -> bool:
        """Free a HELD sequence; its full blocks stay in the prefix cache. False, and nothing else, if none such is here."""
        sequence = self._sequences.get(sequence_id)
        return sequence is not None and sequence.status is Status.HELD and self.cancel(sequence_id)

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, on_layer: PlanLayerListener | None = None) -> StepOutput:
        """Compute one step. Whatever the runner or `on_layer` raises fails the sequences of the step with EngineFault."""
        self._between_steps()
        plan = self._scheduler.schedule()
        if plan is None:
            self._alive_s = self._clock.now()
            return StepOutput()
        self._stamp_started(plan)
        self._stepping = True
        try:
            result = self._runner.run(plan, _bind(on_layer, plan))
        except Exception as error:  # the boundary: it ends these requests, and the engine lives on
            output = self._fail_all(plan, f"the step failed: {type(error).__name__}: {error}")
        else:
            output = self._apply(plan, result)
        finally:
            self._stepping = False
        self._steps += 1
        self._alive_s = self._clock.now()
        return output

    def responds(self) -> bool:
        """Whether the runner can still compute one token by itself. Tells a device that is gone from a request that breaks
        the steps it is in. True without asking where not even one block is free."""
        self._between_steps()
        canary = Sequence("canary", [0], prompt_tokens=1, sampling=SamplingParams(max_tokens=1, temperature=0.0))
        if not self._blocks.allocate(canary):
            return True
        try:
            result = self._runner.run(StepPlan((Scheduled(canary, 0, 1, samples=True),)), None)
        except Exception:  # the question is whether it fails, however it does
            return False
        finally:
            self._blocks.free(canary, keep_cached=False)
        return not result.faults

    def load(self) -> EngineLoad:
        """How busy it is, for heartbeats. `running` includes what only waits for a place in the batch; `held_blocks` counts a
        shared block once for each sequence that keeps it; `step_age_s` is the time since the step loop was last seen
        alive, 0 with nothing to do."""
        active, pinned = self._scheduler.active(), self._scheduler.pinned()
        return EngineLoad(
            waiting=self._scheduler.waiting,
            waiting_tokens=self._scheduler.waiting_tokens,
            running=len(active),
            context_tokens=sum(len(sequence.tokens) for sequence in active),
            free_blocks=self._blocks.free_blocks,
            held_blocks=sum(len(sequence.blocks) for sequence in pinned),
            steps=self._steps,
            step_age_s=max(0.0, self._clock.now() - self._alive_s) if self.has_work else 0.0,
        )

    def invariants(self) -> list[str]:
        """What is wrong, in words; plus, because nothing may be left when clients are gone, every sequence still here."""
        wrong = self._scheduler.check()
        wrong += [f"sequence {name} is still {sequence.status.value}" for name, sequence in self._sequences.items()]
        if not self._sequences and self._blocks.free_blocks != self._blocks.num_blocks:
            wrong.append(f"idle, but {self._blocks.free_blocks} of {self._blocks.num_blocks} blocks are free")
        return wrong

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check(self, sequence: Sequence) -> None:
        """Refuse whatever could break a step or never end. Indexes of client-given token ids reach tensors unchecked."""
        self._between_steps()
        vocabulary, limit = self._runner.vocab_size, self._runner.max_model_len
        sampling = sequence.sampling
        if sequence.status is not Status.WAITING or sequence.blocks or sequence.computed_tokens:
            raise ValueError(f"sequence {sequence.sequence_id} is not new: {sequence.status.value}")
        if sequence.sequence_id in self._sequences:
            raise InvalidRequest(f"sequence {sequence.sequence_id} is already here")
        if min(sequence.tokens) < 0 or max(sequence.tokens) >= vocabulary:
            raise InvalidRequest(f"Got a token id outside the vocabulary of {vocabulary}", "prompt")
        if max(sampling.logit_bias, default=0) >= vocabulary:
            raise InvalidRequest(f"Got a token id outside the vocabulary of {vocabulary}", "logit_bias")
        if max(sampling.stop_token_ids, default=0) >= vocabulary:
            raise InvalidRequest(f"Got a token id outside the vocabulary of {vocabulary}", "stop_token_ids")
        remaining = sampling.max_tokens - sequence.output_tokens
        if remaining < 1:
            raise InvalidRequest(f"{sequence.output_tokens} of {sampling.max_tokens} tokens are there already", "max_tokens")
        if len(sequence.tokens) + remaining > limit:
            raise ContextLengthExceeded(
                f"Got {sequence.prompt_tokens} prompt tokens and max_tokens = {sampling.max_tokens} but the model takes {limit}",
                "max_tokens",
            )

    def _wake(self) -> None:
        """A loop that had nothing to do was not stuck."""
        if not self.has_work:
            self._alive_s = self._clock.now()

    def _end(self, sequence: Sequence, keep_cached: bool = True) -> None:
        self._scheduler.remove(sequence, keep_cached)
        del self._sequences[sequence.sequence_id]

    def _stamp_started(self, plan: StepPlan) -> None:
        now_s = self._clock.now()
        for item in plan.scheduled:
            if item.sequence.started_s is None:
                item.sequence.started_s = now_s

    def _apply(self, plan: StepPlan, result: StepResult) -> StepOutput:
        samples = sum(item.samples for item in plan.scheduled)
        if len(result.drawn) != samples:
            return self._fail_all(plan, f"the runner drew {len(result.drawn)} tokens for {samples} sequences")
        tokens: list[NewToken] = []
        failed: list[tuple[Sequence, HetServeError]] = []
        drawn = iter(result.drawn)
        now_s = self._clock.now()
        for index, item in enumerate(plan.scheduled):
            draw = next(drawn) if item.samples else None
            fault = result.faults.get(index) or self._fault_of(draw)
            if fault is not None:
                failed.append(self._fail(item.sequence, fault))
                continue
            self._computed(item)
            if draw is not None:
                tokens.append(self._emit(item.sequence, draw, now_s))
        return StepOutput(tuple(tokens), tuple(failed), plan)

    def _computed(self, item: Scheduled) -> None:
        item.sequence.computed_tokens = item.start + item.count
        self._blocks.register(item.sequence, item.start)

    def _emit(self, sequence: Sequence, draw: Drawn, now_s: float) -> NewToken:
        position = sequence.output_tokens
        finish, stop_token = self._append(sequence, draw.token)
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        if sequence.hold:
            self._scheduler.hold(sequence)
        elif finish is not None:
            self._end(sequence)
        return NewToken(sequence, draw.token, position, draw.logprobs, finish, stop_token)

    def _append(self, sequence: Sequence, token: int) -> tuple[FinishReason | None, int | None]:
        """Add one output token; say whether it is the last, and which stop id (not an end of sequence) made it so."""
        sampling = sequence.sampling
        may_stop = sequence.output_tokens >= sampling.min_tokens
        sequence.tokens.append(token)
        if may_stop and not sampling.ignore_eos and token in self._runner.eos_token_ids:
            return FinishReason.STOP, None
        if may_stop and token in sampling.stop_token_ids:
            return FinishReason.STOP, token
        if sequence.output_tokens >= sampling.max_tokens or len(sequence.tokens) >= self._runner.max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    def _fault_of(self, draw: Drawn | None) -> str | None:
        if draw is None or 0 <= draw.token < self._runner.vocab_size:
            return None
        return f"the runner drew token {draw.token}, outside the vocabulary"

    def _fail(self, sequence: Sequence, reason: str) -> tuple[Sequence, HetServeError]:
        """Free a sequence whose step went wrong. Its KV may be wrong too, so the prefix cache forgets it."""
        self._end(sequence, keep_cached=False)
        return sequence, EngineFault(reason)

    def _fail_all(self, plan: StepPlan, reason: str) -> StepOutput:
        return StepOutput((), tuple(self._fail(item.sequence, reason) for item in plan.scheduled), plan)

    def _between_steps(self) -> None:
        if self._stepping:
            raise EngineFault("the engine was called while it was stepping: its blocks are in use")


def _bind(on_layer: PlanLayerListener | None, plan: StepPlan) -> LayerListener | None:
    if on_layer is None:
        return None

    def listen(layer: int) -> None:
        on_layer(plan, layer)

    return listen
