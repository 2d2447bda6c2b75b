from __future__ import annotations

from collections.abc import Callable

import pytest

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.errors import ContextLengthExceeded, EngineFault, InvalidRequest, Overloaded, ProtocolError
from core.request import FinishReason
from core.sampling import SamplingParams
from engine.admission import Admission, AdmissionKind
from engine.decision import Part
from engine.engine import Engine
from engine.plan import Drawn, Handle, StepPlan, StepResult
from engine.sequence import NewToken, Sequence, Status
from engine.simulated_runner import SimulatedRunner
from tests.support.engines import VOCAB, KVCheckingRunner, layout, run_alone, sequence, simulated_runner

PROMPT = list(range(10, 20))


class ScriptedRunner(SimulatedRunner):
    """Draws the tokens of a script, one a step, the same for every sequence."""

    def __init__(
        self, script: list[int], *, eos: frozenset[int] = frozenset({7}), max_model_len: int = 64, num_blocks: int = 32
    ) -> None:
        super().__init__(layout(4), num_blocks, max_model_len, VOCAB, CostModel(), None, eos)
        self._script = script
        self._place = -1

    def collect(self, handle: Handle) -> StepResult:
        drawn = super().collect(handle).drawn
        self._place += 1
        return StepResult((Drawn(self._script[self._place]),) * len(drawn), {})


class FaultyRunner(KVCheckingRunner):
    def __init__(self, fault: Callable[[StepPlan], dict[int, str]]) -> None:
        super().__init__(32, 4)
        self.fault = fault


def engine(
    runner: SimulatedRunner | None = None,
    clock: ManualClock | None = None,
    *,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    max_waiting_tokens: int = 1000,
) -> Engine:
    config = EngineConfig(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_waiting_tokens=max_waiting_tokens
    )
    return Engine(runner or simulated_runner(), config, clock or ManualClock())


def grant(it: Engine, reserved: Sequence) -> None:
    it.reserve(reserved)
    assert it.admissions() == (Admission(AdmissionKind.GRANTED, reserved),)


def drain(it: Engine) -> list[NewToken]:
    tokens: list[NewToken] = []
    while it.has_work:
        output = it.step()
        assert not output.failed
        tokens += output.tokens
    return tokens


def generate(runner: SimulatedRunner, **params: object) -> NewToken:
    """The last token of a generation with these sampling parameters."""
    it = engine(runner)
    it.add(sequence("a", PROMPT, sampling=SamplingParams(**params)))
    tokens = drain(it)
    assert [token.position for token in tokens] == list(range(len(tokens)))
    assert [token.finish for token in tokens[:-1]] == [None] * (len(tokens) - 1)
    assert it.invariants() == []
    return tokens[-1]


# --- how a generation ends ------------------------------------------------------------------------------------------------


def test_max_tokens_ends_a_generation() -> None:
    last = generate(ScriptedRunner([1] * 9), max_tokens=3)
    assert (last.position, last.finish, last.stop_token) == (2, FinishReason.LENGTH, None)


def test_an_end_of_sequence_ends_it_and_is_no_stop_id() -> None:
    last = generate(ScriptedRunner([1, 7, 1]), max_tokens=3)
    assert (last.position, last.finish, last.stop_token) == (1, FinishReason.STOP, None)


def test_ignore_eos_goes_on() -> None:
    assert generate(ScriptedRunner([1, 7, 1]), max_tokens=3, ignore_eos=True).position == 2


def test_a_stop_id_ends_it_and_is_named() -> None:
    last = generate(ScriptedRunner([1, 9, 1]), max_tokens=3, stop_token_ids=(8, 9), ignore_eos=True)
    assert (last.position, last.finish, last.stop_token) == (1, FinishReason.STOP, 9)


def test_a_stop_at_the_last_token_is_a_stop() -> None:
    assert generate(ScriptedRunner([1, 7]), max_tokens=2).finish is FinishReason.STOP


def test_nothing_stops_before_min_tokens() -> None:
    assert generate(ScriptedRunner([7, 9, 7, 1]), max_tokens=4, min_tokens=2, stop_token_ids=(9,)).position == 2


def test_output_goes_on_where_an_earlier_attempt_stopped() -> None:
    params = SamplingParams(max_tokens=8, seed=5)
    output = run_alone(PROMPT, params)
    it = engine()
    it.add(sequence("again", PROMPT, delivered=output[:3], sampling=params))
    tokens = drain(it)
    assert [token.position for token in tokens] == [3, 4, 5, 6, 7]
    assert [token.token for token in tokens] == output[3:]


# --- the door -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "param"),
    [
        (sequence("s", [1] * 60, 5), ContextLengthExceeded, "max_tokens"),
        (sequence("s", [1, VOCAB]), InvalidRequest, "prompt"),
        (sequence("s", [1, -1]), InvalidRequest, "prompt"),
        (sequence("s", [1], 2, delivered=[3, 4]), InvalidRequest, "max_tokens"),
        (sequence("s", [1], sampling=SamplingParams(logit_bias={VOCAB: 1.0})), InvalidRequest, "logit_bias"),
        (sequence("s", [1], sampling=SamplingParams(stop_token_ids=(VOCAB,))), InvalidRequest, "stop_token_ids"),
    ],
)
def test_what_can_only_fail_is_refused_by_name(bad: Sequence, error: type[InvalidRequest], param: str) -> None:
    it = engine(simulated_runner(max_model_len=64))
    for enter in (it.add, it.reserve):
        with pytest.raises(error) as caught:
            enter(bad)
        assert caught.value.param == param
    assert it.invariants() == []


def test_the_longest_that_fits_the_model_is_served() -> None:
    it = engine(simulated_runner(max_model_len=64))
    it.add(sequence("s", [1] * 60, 4))
    assert drain(it)[-1].finish is FinishReason.LENGTH


def test_what_the_cache_can_never_hold_is_refused_and_the_most_it_can_is_served() -> None:
    it = engine(simulated_runner(4, 4))
    with pytest.raises(ContextLengthExceeded):
        it.add(sequence("s", [1] * 10, 8))
    it.add(sequence("s", [1] * 10, 7))
    assert len(drain(it)) == 7


def test_an_id_in_use_is_refused_in_every_state_and_free_again_afterwards() -> None:
    it = engine()
    it.add(sequence("same", PROMPT))
    with pytest.raises(InvalidRequest):
        it.add(sequence("same", PROMPT))
    it.step()
    with pytest.raises(InvalidRequest):
        it.reserve(sequence("same", PROMPT))
    it.cancel("same")
    grant(it, sequence("same", PROMPT))
    with pytest.raises(InvalidRequest):
        it.add(sequence("same", PROMPT))


def test_a_sequence_that_was_used_is_refused() -> None:
    it = engine()
    used = sequence("a", PROMPT)
    it.add(used)
    drain(it)
    with pytest.raises(ValueError, match="not new"):
        it.add(used)
    with pytest.raises(ValueError, match="reserved and held"):
        it.reserve(sequence("b", PROMPT, hold=True))


def test_an_overloaded_engine_says_so_and_keeps_nothing() -> None:
    it = engine(max_waiting_tokens=10)
    it.add(sequence("a", PROMPT))
    with pytest.raises(Overloaded):
        it.add(sequence("b", PROMPT))
    drain(it)
    assert it.invariants() == []


# --- hand-off -------------------------------------------------------------------------------------------------------------


def test_a_held_sequence_keeps_its_blocks_until_it_is_cancelled() -> None:
    it = engine()
    held = sequence("h", PROMPT, hold=True)
    it.add(held)
    (token,) = drain(it)
    assert (held.status, held.computed_tokens, len(held.tables[0]), token.finish) == (Status.HELD, 10, 3, None)
    assert (it.load().held_blocks, it.load().running) == (3, 0)
    assert it.cancel("h")
    assert it.invariants() == []
    again = sequence("again", PROMPT)
    it.add(again)
    it.step()
    assert again.cached_tokens == 8


def test_a_held_sequence_that_its_first_token_ends_says_so_and_is_still_held() -> None:
    it = engine()
    it.add(sequence("h", PROMPT, 1, hold=True))
    (token,) = drain(it)
    assert token.finish is FinishReason.LENGTH
    assert it.invariants()
    assert it.cancel("h")


def test_a_started_sequence_goes_on_from_the_token_drawn_elsewhere() -> None:
    params = SamplingParams(max_tokens=8, seed=5)
    output = run_alone(PROMPT, params)
    it = engine()
    moved = sequence("m", PROMPT, sampling=params)
    grant(it, moved)
    assert it.start(moved, output[0]) is None
    tokens = drain(it)
    assert [token.token for token in tokens] == output[1:]
    assert tokens[0].position == 1
    assert it.invariants() == []


def test_a_started_sequence_is_in_the_prefix_cache_but_a_reservation_is_not() -> None:
    it = engine()
    moved, early, late = (sequence(name, PROMPT) for name in ("moved", "early", "late"))
    grant(it, moved)
    grant(it, early)
    it.start(moved, 1)
    grant(it, late)
    assert (early.cached_tokens, late.cached_tokens) == (0, 8)
    assert late.tables[0][:2] == moved.tables[0][:2]


@pytest.mark.parametrize(("token", "max_tokens", "finish"), [(7, 8, FinishReason.STOP), (1, 1, FinishReason.LENGTH)])
def test_a_first_token_that_ends_it_frees_it_at_the_start(token: int, max_tokens: int, finish: FinishReason) -> None:
    it = engine()
    moved = sequence("m", PROMPT, max_tokens)
    grant(it, moved)
    assert it.start(moved, token) is finish
    assert it.invariants() == []


def test_a_start_without_a_reservation_or_with_no_such_token_changes_nothing() -> None:
    it = engine()
    moved = sequence("m", PROMPT)
    with pytest.raises(EngineFault):
        it.start(moved, 1)
    grant(it, moved)
    for token in (-1, VOCAB):
        with pytest.raises(ProtocolError):
            it.start(moved, token)
    assert it.start(moved, 1) is None
    with pytest.raises(EngineFault):
        it.start(moved, 1)


def test_a_reservation_waits_for_room_and_is_granted_while_no_step_can_be_launched() -> None:
    it = engine(simulated_runner(4, 4))
    grant(it, sequence("a", PROMPT, 2))
    waiting = sequence("b", PROMPT, 2)
    it.reserve(waiting)
    assert it.admissions() == ()
    assert not it.step().parts
    assert (it.has_work, waiting.tables, it.load().waiting, it.load().waiting_tokens) == (False, [], 1, 10)
    it.cancel("a")
    assert it.admissions() == (Admission(AdmissionKind.GRANTED, waiting),)
    it.cancel("b")
    assert it.invariants() == []


def test_a_reservation_is_granted_while_a_step_is_in_flight() -> None:
    it = engine(simulated_runner(steps_ahead=0))
    it.add(sequence("a", PROMPT))
    assert it.launch()
    grant(it, sequence("b", PROMPT))
    assert it.in_flight == 1


def test_reservations_are_never_refused_because_too_much_waits() -> None:
    it = engine(simulated_runner(4, 4), max_waiting_tokens=10)
    for name in ("a", "b", "c"):
        it.reserve(sequence(name, PROMPT, 2))
    with pytest.raises(Overloaded):
        it.add(sequence("d", PROMPT, 2))


def wounded(it: Engine, pin: bool = False) -> tuple[list[NewToken], bool]:
    """The life of a prompt of 10 of 16 tokens, to which an older claim on all comes once it is read: its tokens."""
    held, claim = sequence("h", PROMPT, hold=True, ticket=2), sequence("c", list(range(13)), 2, ticket=1)
    it.add(held)
    tokens = drain(it)
    assert it.admissions() == (Admission(AdmissionKind.ADMITTED, held),)
    assert not pin or it.pin("h")
    it.reserve(claim)
    said = it.admissions()
    if not pin:
        assert said == (Admission(AdmissionKind.TAKEN_BACK, held), Admission(AdmissionKind.GRANTED, claim))
        assert not it.pin("h")
    it.cancel("c")
    tokens += drain(it)
    assert it.cancel("h")
    assert it.invariants() == []
    return tokens, bool(said)


def test_a_prompt_that_lost_its_blocks_emits_its_token_again_whatever_is_drawn() -> None:
    (first, again), _ = wounded(engine(ScriptedRunner([5, 6], num_blocks=4)))
    assert (first.token, first.position, first.finish) == (again.token, again.position, again.finish) == (5, 0, None)


def test_a_pinned_prompt_keeps_its_blocks() -> None:
    tokens, said = wounded(engine(simulated_runner(4, 4)), pin=True)
    assert len(tokens) == 1
    assert not said


def test_only_a_prompt_with_blocks_that_is_to_be_held_can_be_pinned() -> None:
    it = engine(simulated_runner(4, 4))
    it.add(sequence("h", PROMPT, hold=True))
    assert not it.pin("h")
    it.step()
    assert it.pin("h")
    it.cancel("h")
    assert not it.pin("h")
    it.add(sequence("a", PROMPT, 2))
    it.step()
    assert not it.pin("a")


# --- what goes wrong in a step --------------------------------------------------------------------------------------------


def test_a_step_that_raises_fails_its_sequences_and_the_engine_lives_on() -> None:
    def explode(plan: StepPlan) -> dict[int, str]:
        raise RuntimeError("device-side assert")

    runner = FaultyRunner(explode)
    it = engine(runner, max_num_seqs=2)
    for name in ("a", "b", "c"):
        it.add(sequence(name, PROMPT))
    output = it.step()
    assert sorted(failed.sequence_id for failed, _ in output.failed) == ["a", "b"]
    assert all(isinstance(error, EngineFault) and "device-side assert" in str(error) for _, error in output.failed)
    assert all(failed.status is Status.FINISHED and not failed.tables for failed, _ in output.failed)
    runner.fault = None
    assert [token.token for token in drain(it)] == run_alone(PROMPT, SamplingParams(max_tokens=8))
    assert it.invariants() == []
    assert it.load().steps == 9


def test_a_fault_ends_its_sequence_alone() -> None:
    runner = FaultyRunner(lambda plan: {1: "logits are not finite"})
    it = engine(runner)
    for name in ("a", "b", "c"):
        it.add(sequence(name, [*PROMPT, ord(name) % VOCAB]))
    output = it.step()
    ((failed, error),) = output.failed
    assert (failed.sequence_id, type(error), str(error)) == ("b", EngineFault, "logits are not finite")
    assert [token.sequence.sequence_id for token in output.tokens] == ["a", "c"]
    runner.fault = None
    drain(it)
    assert it.invariants() == []


def test_kv_of_a_faulty_sequence_is_not_reused() -> None:
    runner = FaultyRunner(lambda plan: {})
    it = engine(runner, max_num_batched_tokens=8)
    it.add(sequence("bad", PROMPT))
    it.step()
    runner.fault = lambda plan: {0: "logits are not finite"}
    assert it.step().failed
    runner.fault = None
    again = sequence("again", PROMPT)
    it.add(again)
    drain(it)
    assert again.cached_tokens == 0


@pytest.mark.parametrize("drawn", [(), (Drawn(1), Drawn(1)), (Drawn(-1),), (Drawn(VOCAB),)])
def test_what_a_runner_must_not_draw_fails_the_sequence(drawn: tuple[Drawn, ...]) -> None:
    class Wild(ScriptedRunner):
        def collect(self, handle: Handle) -> StepResult:
            return StepResult(drawn, {})

    it = engine(Wild([]))
    it.add(sequence("a", PROMPT))
    ((_, error),) = it.step().failed
    assert isinstance(error, EngineFault)
    assert it.invariants() == []


@pytest.mark.parametrize("signal", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through_and_ends_the_step_that_it_broke(signal: type[BaseException]) -> None:
    def interrupt(plan: StepPlan) -> dict[int, str]:
        raise signal

    runner = FaultyRunner(interrupt)
    it = engine(runner)
    it.add(sequence("a", PROMPT))
    with pytest.raises(signal):
        it.step()
    runner.fault = None
    ((failed, error),) = it.step().failed
    assert (failed.sequence_id, "interrupted" in str(error)) == ("a", True)
    it.add(sequence("b", PROMPT))
    assert [token.token for token in drain(it)] == run_alone(PROMPT, SamplingParams(max_tokens=8))
    assert it.invariants() == []


def test_a_listener_hears_of_each_layer_what_is_computed_of_those_to_be_handed_over() -> None:
    it = engine(max_num_batched_tokens=12)
    it.add(sequence("h", PROMPT, hold=True))
    it.add(sequence("a", PROMPT))
    heard: list[tuple[list[tuple[str, int, int]], int]] = []

    def listen(parts: tuple[Part, ...], layer: int) -> None:
        heard.append(([(part.sequence.sequence_id, part.start, part.count) for part in parts], layer))

    while it.has_work:
        it.step(listen)
    assert heard[:2] == [([("h", 0, 10)], 0), ([("h", 0, 10)], 1)]
    assert heard[2:] == [([], 0), ([], 1)] * (it.load().steps - 1), "a sign of life, of whatever step"


def test_a_listener_that_calls_back_into_the_engine_fails_the_step_and_frees_nothing_in_use() -> None:
    it = engine()
    it.add(sequence("a", PROMPT, hold=True))

    def meddle(parts: tuple[Part, ...], layer: int) -> None:
        it.cancel("a")

    output = it.step(meddle)
    ((failed, error),) = output.failed
    assert failed.sequence_id == "a"
    assert "while it was stepping" in str(error)
    assert it.invariants() == []


# --- what it says of itself -----------------------------------------------------------------------------------------------


def test_sequences_are_stamped_when_they_start_and_when_they_first_draw() -> None:
    clock = ManualClock(100.0)
    it = engine(simulated_runner(clock=clock, cost=CostModel(step_s=1.0)), clock, max_num_batched_tokens=5)
    each = sequence("a", PROMPT, arrived_s=90.0)
    it.add(each)
    while each.first_token_s is None:
        it.step()
    assert each.started_s == 100.0
    assert each.first_token_s == clock.now() > 102.0
    drain(it)
    assert each.first_token_s < clock.now()


def test_load_counts_what_waits_runs_and_is_kept() -> None:
    it = engine(max_num_seqs=1)
    for name in ("a", "b", "c"):
        it.add(sequence(name, PROMPT))
    it.step()
    grant(it, sequence("r", [1] * 8, arrived_s=-1.0))
    load = it.load()
    assert (load.waiting, load.waiting_tokens, load.running, load.context_tokens) == (2, 20, 1, 11)
    assert (load.free_blocks, load.held_blocks, load.steps) == (64 - 3 - 2, 2, 1)


def test_whatever_is_left_behind_is_named() -> None:
    it = engine()
    it.add(sequence("left", PROMPT))
    it.step()
    assert it.invariants() == ["sequence left is still running"]
    it.cancel("left")
    assert not it.cancel("left")
    assert it.invariants() == []
