"""Steps that are decided before the last ones are known: what is launched, what counts, and which blocks may be handed out.

The runner's device reads and writes KV at the last moment, when a step is collected, so that whoever is given a block under a
step in flight is found out (`KVCheckingRunner`).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.request import FinishReason
from core.sampling import SamplingParams
from engine.engine import Engine
from engine.plan import StepPlan
from engine.sequence import Sequence, Status
from tests.support.engines import KVCheckingRunner, run_alone, sequence

PROMPT = list(range(10, 20))
OTHER = list(range(30, 40))
MANY = list(range(20, 48))
EOS_CHANCE = 0.2
STEP = CostModel(step_s=1.0, prefill_token_s=0, attention_s=0, decode_sequence_s=0, decode_context_s=0)


class Rig:
    """An engine whose every plan is kept."""

    def __init__(self, num_blocks: int = 16, steps_ahead: int = 1, eos_chance: float = 0.0, **config: object) -> None:
        self.clock = ManualClock()
        self.runner = KVCheckingRunner(num_blocks, 4, eos_chance, steps_ahead, STEP, self.clock)
        self.engine = Engine(self.runner, EngineConfig.model_validate({"headroom_tokens": 0, **config}), self.clock)
        self.plans: list[StepPlan] = []
        launch = self.runner.launch

        def keep(plan: StepPlan, on_layer: object = None) -> object:
            self.plans.append(plan)
            return launch(plan, on_layer)

        self.runner.launch = keep

    def add(self, name: str, prompt: list[int] = PROMPT, max_tokens: int = 8, **options: object) -> Sequence:
        added = sequence(name, prompt, max_tokens, **options)
        self.engine.add(added)
        return added

    def launch(self, times: int = 1) -> None:
        assert [self.engine.launch() for _ in range(times)] == [True] * times

    def finish(self) -> None:
        while self.engine.has_work:
            assert self.engine.step().failed == ()
        assert self.engine.invariants() == []
        assert self.runner.wrong == []

    @property
    def rows_scheduled(self) -> int:
        return sum(len(plan.scheduled) for plan in self.plans)


def used_in_flight(rig: Rig) -> set[int]:
    """The blocks that steps in flight read or write."""
    return {slot[0] for touched in rig.runner._touched.values() for _, slot, _ in touched.reads}


# --- what is launched -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_no_more_steps_are_in_flight_than_the_runner_takes(steps_ahead: int) -> None:
    rig = Rig(steps_ahead=steps_ahead)
    rig.add("a")
    assert [rig.engine.launch() for _ in range(4)] == [True] * (steps_ahead + 1) + [False] * (3 - steps_ahead)
    assert rig.engine.in_flight == steps_ahead + 1
    rig.engine.collect()
    assert [rig.engine.launch(), rig.engine.launch()] == [True, False]
    rig.finish()


def test_a_step_is_ready_when_the_device_is_done_with_it() -> None:
    rig = Rig()
    rig.add("a")
    assert not rig.engine.ready
    rig.launch(2)
    assert not rig.engine.ready
    rig.clock.advance(1.0)
    assert rig.engine.ready
    assert [new.token for new in rig.engine.collect().tokens] == run_alone(PROMPT, SamplingParams(max_tokens=1))
    assert not rig.engine.ready
    assert rig.engine.collect().tokens[0].position == 1


def test_nothing_to_collect_gives_nothing() -> None:
    output = Rig().engine.collect()
    assert (output.tokens, output.failed, output.parts) == ((), (), ())


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_the_last_token_is_foreseen_and_no_row_is_computed_past_it(steps_ahead: int) -> None:
    rig = Rig(steps_ahead=steps_ahead, max_num_batched_tokens=64)
    for name, max_tokens in (("a", 1), ("b", 2), ("c", 5)):
        rig.add(name, [*PROMPT, ord(name) % 50], max_tokens)
    rig.finish()
    assert rig.rows_scheduled == 1 + 2 + 5


@pytest.mark.parametrize("steps_ahead", [0, 1, 2])
def test_a_sequence_with_hold_draws_one_token(steps_ahead: int) -> None:
    rig = Rig(steps_ahead=steps_ahead)
    held = rig.add("h", hold=True)
    rig.launch()
    assert not rig.engine.launch()
    (new,) = rig.engine.collect().tokens
    assert (held.status, held.computed_tokens, held.pending_tokens, new.finish) == (Status.HELD, 10, 0, None)
    rig.runner.read(held, 10)
    assert rig.engine.cancel("h")
    rig.finish()


def test_a_place_in_the_batch_is_free_once_the_last_token_is_being_drawn() -> None:
    rig = Rig(max_num_seqs=1)
    rig.add("a", max_tokens=1)
    rig.add("b", OTHER, max_tokens=1)
    rig.launch(2)
    assert rig.engine.load().running == 2
    assert [len(plan.scheduled) for plan in rig.plans] == [1, 1]
    rig.finish()


def test_rows_are_numbered_from_the_smallest_that_is_free() -> None:
    rig = Rig(num_blocks=40, max_num_seqs=2)
    for name in "abcdefgh":
        rig.add(name, [*PROMPT, ord(name) % 50], max_tokens=2)
    rig.finish()
    assert {item.row for plan in rig.plans for item in plan.scheduled} == {0, 1}


# --- what counts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps_ahead", [1, 2])
def test_the_token_computed_past_an_end_is_seen_by_nobody(steps_ahead: int) -> None:
    params = SamplingParams(max_tokens=30, seed=3)
    expected = run_alone(PROMPT, params, EOS_CHANCE)
    assert 2 < len(expected) < 30, "it ends by an end of sequence"
    rig = Rig(steps_ahead=steps_ahead, eos_chance=EOS_CHANCE)
    rig.add("a", sampling=params)
    tokens = []
    while rig.engine.has_work:
        output = rig.engine.step()
        assert not output.failed
        tokens += output.tokens
    assert [new.token for new in tokens] == expected
    assert [new.finish for new in tokens] == [None] * (len(expected) - 1) + [FinishReason.STOP]
    assert rig.rows_scheduled == len(expected) + steps_ahead
    rig.finish()


def test_a_fault_ends_its_sequence_whatever_later_steps_computed() -> None:
    rig = Rig()
    rig.add("bad")
    rig.add("good", OTHER)
    rig.runner.fault = lambda plan: {0: "logits are not finite"}
    rig.launch()
    rig.runner.fault = None
    rig.launch()
    output = rig.engine.collect()
    assert [(failed.sequence_id, str(error)) for failed, error in output.failed] == [("bad", "logits are not finite")]
    assert not output.failed_whole
    output = rig.engine.collect()
    assert ([new.sequence.sequence_id for new in output.tokens], output.failed) == (["good"], ())
    rig.finish()


def test_a_step_that_breaks_takes_down_its_own_sequences_and_the_next_step_goes_on_for_the_others() -> None:
    rig = Rig(max_num_seqs=2)
    rig.add("a")
    rig.runner.fault = explode
    rig.launch()
    rig.runner.fault = None
    other = rig.add("b", OTHER)
    rig.launch()
    output = rig.engine.collect()
    assert ([failed.sequence_id for failed, _ in output.failed], output.failed_whole) == (["a"], True)
    output = rig.engine.collect()
    assert ([new.sequence for new in output.tokens], output.failed, output.failed_whole) == ([other], (), False)
    rig.finish()


def explode(plan: StepPlan) -> dict[int, str]:
    raise RuntimeError("device-side assert")


def test_an_id_used_again_gets_nothing_of_the_steps_of_its_namesake() -> None:
    rig = Rig()
    rig.add("same")
    rig.launch(2)
    assert rig.engine.cancel("same")
    again = rig.add("same", OTHER, 3)
    assert rig.engine.collect().tokens == rig.engine.collect().tokens == ()
    rig.finish()
    assert again.tokens[10:] == run_alone(OTHER, SamplingParams(max_tokens=3))


def test_kv_is_found_by_its_content_only_once_its_step_is_over() -> None:
    rig = Rig(num_blocks=32, max_num_seqs=1)
    rig.add("a", max_tokens=1)
    early, late = rig.add("early", max_tokens=1), rig.add("late", max_tokens=1)
    rig.launch(2)
    assert early.cached_tokens == 0
    rig.finish()
    assert late.cached_tokens == 8


def test_the_device_can_be_asked_for_a_sign_of_life_while_steps_are_in_flight() -> None:
    rig = Rig()
    rig.add("a")
    rig.launch(2)
    assert rig.engine.responds()
    rig.runner.fault = explode
    assert not rig.engine.responds()
    rig.runner.fault = None
    rig.finish()


# --- which blocks may be handed out ---------------------------------------------------------------------------------------


def read_a_chunk(rig: Rig) -> Sequence:
    """In flight: part of a prompt, by a step that draws nothing."""
    owner = rig.add("a", list(range(24)))
    rig.launch()
    return owner


def read_two_chunks(rig: Rig) -> Sequence:
    owner = rig.add("a", list(range(24)))
    rig.launch(2)
    return owner


def write_a_token(rig: Rig) -> Sequence:
    owner = rig.add("a", PROMPT)
    for _ in range(3):
        rig.engine.step()
    return owner


def draw_the_last_token(rig: Rig) -> Sequence:
    owner = rig.add("a", PROMPT, max_tokens=1)
    rig.launch()
    if owner.pending_tokens == 0:  # its prompt took two steps
        rig.launch()
    return owner


BUSY = [read_a_chunk, read_two_chunks, write_a_token, draw_the_last_token]


def cancelled_in_flight(busy: Callable[[Rig], Sequence]) -> tuple[Rig, set[int]]:
    """And the blocks that steps in flight still use."""
    rig = Rig(num_blocks=8, max_num_batched_tokens=8, prefix_cache=False)
    owner = busy(rig)
    used = used_in_flight(rig)
    assert used
    assert rig.engine.cancel(owner.sequence_id)
    return rig, used


@pytest.mark.parametrize("busy", BUSY)
def test_a_reservation_gets_no_block_that_a_step_in_flight_uses(busy: Callable[[Rig], Sequence]) -> None:
    """Not even where the step draws nothing, so that nobody waits for its tokens. The cache holds one of the two."""
    rig, used = cancelled_in_flight(busy)
    incoming = sequence("new", MANY, 4)
    rig.engine.reserve(incoming)
    while rig.engine.in_flight:
        assert not take_in(rig, incoming)
        rig.engine.collect()
    assert take_in(rig, incoming)
    assert used & set(incoming.tables[0])
    rig.engine.start(incoming, 1)
    rig.finish()


@pytest.mark.parametrize("busy", BUSY)
def test_a_prompt_gets_no_block_that_a_step_in_flight_uses(busy: Callable[[Rig], Sequence]) -> None:
    rig, used = cancelled_in_flight(busy)
    newcomer = rig.add("new", MANY, 4)
    while rig.engine.in_flight:
        assert not rig.engine.launch()
        assert newcomer.tables == []
        rig.engine.collect()
    rig.launch()
    assert used & set(newcomer.tables[0])
    rig.finish()
    assert newcomer.tokens[28:] == run_alone(MANY, SamplingParams(max_tokens=4))


def take_in(rig: Rig, owner: Sequence) -> bool:
    """Once it has its blocks, let all its KV arrive at once."""
    if owner not in [admission.sequence for admission in rig.engine.admissions()]:
        return False
    rig.runner.write(owner, 0, len(owner.tokens))
    return True


def test_blocks_of_a_sequence_that_ended_cool_until_the_step_that_computes_past_its_end_is_over() -> None:
    rig = Rig(num_blocks=5, prefix_cache=False, eos_chance=EOS_CHANCE)
    ended = rig.add("a", sampling=SamplingParams(max_tokens=10, seed=3))
    while ended.status is not Status.FINISHED:
        rig.engine.step()
    assert rig.engine.in_flight == 1
    incoming = sequence("r", OTHER, 2)
    rig.engine.reserve(incoming)
    assert not take_in(rig, incoming)
    assert rig.engine.load().free_blocks < 3
    rig.engine.collect()
    assert take_in(rig, incoming)
    rig.engine.start(incoming, 1)
    rig.finish()


def test_nobody_is_preempted_while_steps_are_in_flight_whose_end_may_make_room() -> None:
    """The older one stops with its third token, which is not known yet when both would need a fourth block."""
    stop = run_alone(PROMPT, SamplingParams(max_tokens=3))[2]
    rig = Rig(num_blocks=7, prefix_cache=False)
    rig.add("a", sampling=SamplingParams(max_tokens=8, stop_token_ids=(stop,)))
    younger = rig.add("b", OTHER, max_tokens=6)
    rig.finish()
    assert younger.preemptions == 0
    assert rig.rows_scheduled == 3 + 6, "nor was the older one computed past its end"


def test_whoever_must_be_preempted_is_once_nothing_is_in_flight_and_goes_on_exactly() -> None:
    rig = Rig(num_blocks=7, prefix_cache=False)
    names = [("a", PROMPT), ("b", OTHER)]
    added = [rig.add(name, prompt, max_tokens=9) for name, prompt in names]
    while rig.engine.has_work:
        before = [owner.preemptions for owner in added]
        flying = rig.engine.in_flight
        rig.engine.launch()
        if [owner.preemptions for owner in added] != before:
            assert flying == 0
        rig.engine.collect()
    assert sum(owner.preemptions for owner in added) > 0
    for owner, (_, prompt) in zip(added, names, strict=True):
        assert owner.tokens[10:] == run_alone(prompt, SamplingParams(max_tokens=9))
    rig.finish()


def test_shared_blocks_stay_shared_while_one_of_their_owners_cools() -> None:
    rig = Rig(num_blocks=12)
    rig.add("warm", max_tokens=1)
    rig.finish()
    first = rig.add("a")
    rig.launch(2)
    shared = first.tables[0][:2]
    assert rig.engine.cancel("a")
    second = rig.add("b")
    rig.engine.collect()
    rig.launch()
    assert second.tables[0][:2] == shared
    rig.finish()
    assert second.tokens[10:] == run_alone(PROMPT, SamplingParams(max_tokens=8))
