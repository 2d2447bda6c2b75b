"""One model replica: schedule a step, lay it out, launch it; collect what it computed, apply it.

    add, reserve ──▶ launch ──▶ (the device computes) ──▶ collect ──▶ tokens
                       └───────── launch, if the runner may be a step ahead

Everything that can be known about a sequence beforehand is checked at the door (`add`, `reserve`), so that no request can
break the step that it shares with others. What goes wrong inside a step ends the sequences of that step, never the engine.

Where a runner takes steps ahead (`ModelRunner.steps_ahead`), the next step is decided and laid out while the device computes the
last one, before its tokens are known. A sequence that turns out to have ended has computed a token too many, which nobody
sees: what a step computes counts only for sequences that still live in the blocks they had when it was launched.

Tokens are emitted once, by the collection of the step that drew them. A sequence ends when `NewToken.finish` is set, or in
`StepOutput.failed`, or by `cancel`; with `hold` it goes to HELD with its first token, finished or not, and lives until `cancel`.
Before `pin`, it may lose its blocks to an older claim: then it is read again, and emits the same token once more.

Not thread-safe: one thread calls it, also while steps are in flight; `load` alone may be called by any thread at any time.

Neighbours: `engine.scheduler` decides, `engine.plan_writer` lays out, a `ModelRunner` computes, the prefill and decode workers
call. No tensors here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from core.clock import Clock
from core.config import EngineConfig
from core.errors import EngineFault, HetServeError, InvalidRequest, ProtocolError
from core.groups import LayerGroups, layer_groups
from core.layout import KVLayout
from core.request import FinishReason
from core.sampling import SamplingParams
from engine.admission import Admission
from engine.block_manager import BlockManager
from engine.decision import Part
from engine.entry import check_new
from engine.plan import Drawn, Handle, LayerListener, ModelRunner, StepResult
from engine.plan_writer import PlanWriter
from engine.results import EngineLoad
from engine.scheduler import Scheduler
from engine.sequence import NewToken, Sequence
from engine.windows import Windows

PartsListener = Callable[[tuple[Part, ...], int], None]
"""Called for every layer of a step whose new KV was just written, with its index, and with what the step computes of sequences
with `hold`, if anything.

It runs on the device's thread, which may be another than the engine's, and must not call the engine.
"""


@dataclass(frozen=True)
class StepOutput:
    """What a step produced. `failed` sequences are freed already. `parts` is what it was to compute, empty if there was nothing;
    `failed_whole` when it gave nobody anything, because everybody in it failed."""

    tokens: tuple[NewToken, ...] = ()
    failed: tuple[tuple[Sequence, HetServeError], ...] = ()
    parts: tuple[Part, ...] = ()
    failed_whole: bool = False


@dataclass(frozen=True, eq=False)
class _Launched:
    """A step in flight. `tenancies[i]` is that of the i-th part's sequence at the launch; the handle is what broke the launch, if
    anything did."""

    step: int
    parts: tuple[Part, ...]
    tenancies: list[int]
    handle: Handle | EngineFault


class Engine:
    """Sequences in, tokens out, one step at a time.

    `config` gives the limits; the sizes of the cache and the model are the runner's. `clock` stamps sequences; a caller
    stamps `arrived_s` by the same clock.
    """

    def __init__(self, runner: ModelRunner, config: EngineConfig, clock: Clock) -> None:
        self._runner = runner
        self._clock = clock
        self._groups = layer_groups(runner.layout)
        size = runner.layout.block_size
        windows = Windows(self._groups, size, runner.num_blocks, config.max_num_batched_tokens, runner.steps_ahead)
        self._blocks = BlockManager(runner.num_blocks, size, config.prefix_cache, windows)
        self._capacity_tokens = windows.longest(runner.max_model_len)
        self._scheduler = Scheduler(
            self._blocks,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            config.max_waiting_tokens,
            config.headroom_tokens,
        )
        self._writer = PlanWriter()
        self._vocab_size = runner.vocab_size
        self._eos_token_ids = runner.eos_token_ids
        self._max_model_len = runner.max_model_len
        self._block_size = size
        self._sequences: dict[str, Sequence] = {}
        self._flying: deque[_Launched] = deque()
        self._steps = 0
        self._in_runner = False

    @property
    def layout(self) -> KVLayout:
        return self._runner.layout

    @property
    def groups(self) -> LayerGroups:
        """Which layers share a block table: `Sequence.tables[i]` is that of group `i`."""
        return self._groups

    @property
    def num_blocks(self) -> int:
        return self._blocks.num_blocks

    @property
    def capacity_tokens(self) -> int:
        """The longest sequence that the cache could hold, were it alone; at most what the model takes."""
        return self._capacity_tokens

    @property
    def max_model_len(self) -> int:
        return self._max_model_len

    @property
    def has_work(self) -> bool:
        """Whether `step` may achieve something: steps are in flight, or one may be launched. A `launch` that finds all blocks
        kept for transfers says no, and then there is no work until a sequence comes, goes or starts: so
        `while has_work: step()` never spins."""
        return bool(self._flying) or self._scheduler.has_work

    @property
    def recomputed_tokens(self) -> int:
        """Tokens whose KV was given up to others and is computed again, since the start."""
        return self._scheduler.recomputed_tokens

    @property
    def in_flight(self) -> int:
        """Steps that are launched and not collected."""
        return len(self._flying)

    @property
    def ready(self) -> bool:
        """Whether a step is in flight and `collect` would not wait for it."""
        if not self._flying:
            return False
        handle = self._flying[0].handle
        return isinstance(handle, EngineFault) or handle.done

    # --- in and out ---------------------------------------------------------------------------------------------------

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence to be read and continued here.

        Raises:
            ContextLengthExceeded: prompt and `max_tokens` exceed the model or the whole cache.
            InvalidRequest: a token id outside the vocabulary, nothing left to generate, or an id that is in use.
            Overloaded: too many tokens wait already.
        """
        self._check(sequence)
        self._scheduler.add(sequence)
        self._sequences[sequence.sequence_id] = sequence

    def reserve(self, sequence: Sequence) -> None:
        """Queue a sequence for blocks for all its tokens, whose KV will be written from outside, up to `start`.

        `admissions` says when it has them: GRANTED. The first `cached_tokens` are then here already. Raises what `add` raises,
        but never Overloaded: its prompt is read elsewhere by now.
        """
        if sequence.hold:
            raise ValueError(f"sequence {sequence.sequence_id} cannot be both reserved and held")
        self._check(sequence)
        self._scheduler.reserve(sequence)
        self._sequences[sequence.sequence_id] = sequence

    def admissions(self) -> tuple[Admission, ...]:
        """What happened since the last call to prompts with `hold` and to reservations that still live, in order. Grants what
        can be granted, whether or not a step can be launched."""
        self._outside_runner()
        self._scheduler.admit(may_preempt=not self._flying)
        return self._scheduler.take_admissions()

    def pin(self, sequence_id: str) -> bool:
        """Another engine has room for this prompt with `hold`: from now on it keeps its blocks until it ends. False, and nothing
        else, if it has none (any more)."""
        sequence = self._sequences.get(sequence_id)
        if sequence is None or not sequence.hold or not sequence.tables:
            return False
        sequence.pinned = True
        return True

    def start(self, sequence: Sequence, token: int) -> FinishReason | None:
        """All KV of a granted sequence is in its blocks, and `token` was drawn from it elsewhere and delivered: decode on.

        `token` is not emitted again. Returns why the generation is over if that token ended it; the sequence is then freed.

        Raises:
            EngineFault: the sequence has no grant here.
            ProtocolError: no such token. The grant stays.
        """
        self._outside_runner()
        if not 0 <= token < self._vocab_size:
            raise ProtocolError(f"Got token {token} but the vocabulary ends at {self._vocab_size}")
        first_arrived = sequence.computed_tokens
        self._scheduler.activate(sequence)
        self._blocks.register(sequence, first_arrived)
        finish, _ = self._append(sequence, token)
        if finish is not None:
            self._end(sequence)
        return finish

    def cancel(self, sequence_id: str) -> bool:
        """End a sequence in any state and free all it owns; full blocks of what it has computed stay in the prefix cache. False,
        and nothing else, if it is not (or no longer) here."""
        self._outside_runner()
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self._end(sequence)
        return sequence is not None

    # --- the step -----------------------------------------------------------------------------------------------------

    def launch(self, on_layer: PartsListener | None = None) -> bool:
        """Launch one step, if there is something to compute and the runner may have one more in flight."""
        self._outside_runner()
        if len(self._flying) > self._runner.steps_ahead:
            return False
        decision = self._scheduler.schedule(may_preempt=not self._flying)
        if decision is None:
            return False
        plan = self._writer.write(decision.parts)
        self._note_launch(decision.parts, plan.step)
        handle: Handle | EngineFault = EngineFault("the launch was interrupted")
        self._in_runner = True
        try:
            handle = self._runner.launch(plan, _bind(on_layer, decision.parts))
        except Exception as error:  # the boundary: it ends these requests, and the engine lives on
            handle = _fault(error)
        finally:
            self._in_runner = False
            tenancies = [part.sequence.tenancy for part in decision.parts]
            self._flying.append(_Launched(plan.step, decision.parts, tenancies, handle))
        return True

    def collect(self) -> StepOutput:
        """Wait for the oldest step in flight and take in what it computed; an empty output if none is in flight.

        Whatever the runner raises, then or at the launch, fails the sequences of the step with EngineFault.
        """
        self._outside_runner()
        if not self._flying:
            return StepOutput()
        launched = self._flying[0]
        self._in_runner = True
        try:
            result: StepResult | EngineFault = (
                launched.handle if isinstance(launched.handle, EngineFault) else self._runner.collect(launched.handle)
            )
        except Exception as error:  # the boundary: it ends these requests, and the engine lives on
            result = _fault(error)
        finally:
            self._in_runner = False
        self._flying.popleft()
        self._scheduler.collected(launched.step)
        output = self._apply(launched, result)
        self._steps += 1
        return output

    def step(self, on_layer: PartsListener | None = None) -> StepOutput:
        """For callers with nothing else to do: launch all that may be, then wait for the oldest."""
        while self.launch(on_layer):
            pass
        return self.collect()

    def responds(self) -> bool:
        """Whether the runner can still compute one token by itself. Tells a device that is gone from a request that breaks
        the steps it is in. Waits for the steps in flight, too. True without asking where not even one block is free."""
        self._outside_runner()
        canary = Sequence("canary", [0], prompt_tokens=1, sampling=SamplingParams(max_tokens=1, temperature=0.0))
        if not self._blocks.allocate(canary):
            return True
        if self._blocks.windowed:
            self._blocks.advance(canary, len(canary.tokens))
        try:
            result = self._runner.collect(self._runner.launch(self._writer.write_alone(canary)))
        except Exception:  # the question is whether it fails, however it does
            return False
        finally:
            self._blocks.free(canary, keep_cached=False)
        return not result.faults

    def load(self) -> EngineLoad:
        """How busy it is, for heartbeats."""
        active, kept = self._scheduler.active(), self._scheduler.kept()
        return EngineLoad(
            waiting=self._scheduler.waiting,
            waiting_tokens=self._scheduler.waiting_tokens,
            running=len(active),
            context_tokens=sum(len(sequence.tokens) for sequence in active),
            free_blocks=self._blocks.available_blocks,
            held_blocks=sum(self._blocks.owned(sequence) for sequence in kept),
            steps=self._steps,
        )

    def invariants(self) -> list[str]:
        """What is wrong, in words; plus, because nothing may be left when clients are gone, every sequence still here."""
        wrong = self._scheduler.check() + self._writer.check()
        if not self._flying and self._blocks.cooling_blocks:
            wrong.append(f"{self._blocks.cooling_blocks} blocks cool though no step is in flight")
        wrong += [f"sequence {name} is still {sequence.status.value}" for name, sequence in self._sequences.items()]
        if not self._sequences and not self._flying and self._blocks.free_blocks != self._blocks.num_blocks:
            wrong.append(f"idle, but {self._blocks.free_blocks} of {self._blocks.num_blocks} blocks are free")
        return wrong

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check(self, sequence: Sequence) -> None:
        self._outside_runner()
        if sequence.sequence_id in self._sequences:
            raise InvalidRequest(f"sequence {sequence.sequence_id} is already here")
        check_new(sequence, self._vocab_size, self._max_model_len)

    def _end(self, sequence: Sequence, keep_cached: bool = True) -> None:
        self._scheduler.remove(sequence, keep_cached)
        del self._sequences[sequence.sequence_id]

    def _note_launch(self, parts: tuple[Part, ...], step: int) -> None:
        now_s = self._clock.now()
        leaving: list[Sequence] = []
        for part in parts:
            sequence = part.sequence
            if sequence.started_s is None:
                sequence.started_s = now_s
            sequence.launched_tokens = part.start + part.count
            sequence.last_step = step
            if part.samples:
                sequence.pending_tokens += 1
                if sequence.drawn_out:
                    leaving.append(sequence)
        if leaving:
            self._scheduler.retire(leaving)

    def _apply(self, launched: _Launched, result: StepResult | EngineFault) -> StepOutput:
        samples = sum(part.samples for part in launched.parts)
        if isinstance(result, StepResult) and len(result.drawn) != samples:
            result = EngineFault(f"the runner drew {len(result.drawn)} tokens for {samples} sequences")
        drawn = iter(()) if isinstance(result, EngineFault) else iter(result.drawn)
        tokens: list[NewToken] = []
        failed: list[tuple[Sequence, HetServeError]] = []
        computed = 0
        now_s = self._clock.now()
        for index, (part, tenancy) in enumerate(zip(launched.parts, launched.tenancies, strict=True)):
            draw = next(drawn, None) if part.samples else None
            sequence = part.sequence
            if sequence.tenancy != tenancy:
                continue
            fault = str(result) if isinstance(result, EngineFault) else result.faults.get(index) or self._fault_of(draw)
            if fault is not None:
                failed.append(self._fail(sequence, fault))
                continue
            computed += 1
            end = sequence.computed_tokens = part.start + part.count
            if end // self._block_size > part.start // self._block_size:
                self._blocks.register(sequence, part.start)
            if draw is not None:
                tokens.append(self._emit(sequence, draw, now_s))
        return StepOutput(tuple(tokens), tuple(failed), launched.parts, bool(failed) and not computed)

    def _emit(self, sequence: Sequence, draw: Drawn, now_s: float) -> NewToken:
        if sequence.hold:
            draw = sequence.first = sequence.first or draw
        position = sequence.output_tokens
        sequence.pending_tokens -= 1
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
        sampling, tokens = sequence.sampling, sequence.tokens
        tokens.append(token)
        output_tokens = len(tokens) - sequence.prompt_tokens
        if output_tokens > sampling.min_tokens:
            if token in self._eos_token_ids and not sampling.ignore_eos:
                return FinishReason.STOP, None
            if token in sampling.stop_token_ids:
                return FinishReason.STOP, token
        if output_tokens >= sampling.max_tokens or len(tokens) >= self._max_model_len:
            return FinishReason.LENGTH, None
        return None, None

    def _fault_of(self, draw: Drawn | None) -> str | None:
        if draw is None or 0 <= draw.token < self._vocab_size:
            return None
        return f"the runner drew token {draw.token}, outside the vocabulary"

    def _fail(self, sequence: Sequence, reason: str) -> tuple[Sequence, HetServeError]:
        """Free a sequence whose step went wrong. Its KV may be wrong too, so the prefix cache forgets it."""
        self._end(sequence, keep_cached=False)
        return sequence, EngineFault(reason)

    def _outside_runner(self) -> None:
        if self._in_runner:
            raise EngineFault("the engine was called while it was stepping: its blocks are in use")


def _bind(on_layer: PartsListener | None, parts: tuple[Part, ...]) -> LayerListener | None:
    return None if on_layer is None else partial(on_layer, tuple(part for part in parts if part.sequence.hold))


def _fault(error: Exception) -> EngineFault:
    return EngineFault(f"the step failed: {type(error).__name__}: {error}")
