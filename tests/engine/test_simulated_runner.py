from __future__ import annotations

import math
from collections import Counter

import pytest

from core.clock import ManualClock
from core.cost import CostModel
from core.sampling import SamplingParams
from engine.decision import Part
from engine.plan import LayerListener, StepPlan, StepResult
from engine.plan_writer import PlanWriter
from engine.sequence import Sequence
from engine.simulated_runner import SimulatedRunner
from tests.support.engines import EOS, VOCAB, layout, run_alone, sequence, simulated_runner
from tests.support.plans import Plans

COST = CostModel(step_s=1.0, prefill_token_s=0.1, attention_s=0.0, decode_sequence_s=0.01, decode_context_s=0.001)


def sampling(seed: int = 0, temperature: float = 1.0, logprobs: int | None = None, **more: object) -> SamplingParams:
    return SamplingParams(max_tokens=64, seed=seed, temperature=temperature, logprobs=logprobs, **more)


def whole(owner: Sequence) -> StepPlan:
    return Plans()(Part(owner, 0, len(owner.tokens), True))


def run(runner: SimulatedRunner, plan: StepPlan, on_layer: LayerListener | None = None) -> StepResult:
    """The plan by itself, without a trace."""
    result = runner.collect(runner.launch(plan, on_layer))
    runner._rows.clear()
    return result


def draw(runner: SimulatedRunner, tokens: list[int], params: SamplingParams) -> int:
    return run(runner, whole(sequence("s", tokens, sampling=params))).drawn[0].token


def test_a_step_takes_the_time_of_its_plan() -> None:
    clock = ManualClock()
    runner = simulated_runner(clock=clock, cost=COST)
    decoding, reading = sequence("d", [1] * 10), sequence("p", [2] * 30)
    result = run(runner, Plans()(Part(decoding, 9, 1, True), Part(reading, 0, 20, False)))
    assert clock.now() == pytest.approx(1.0 + 0.01 + 10 * 0.001 + 20 * 0.1)
    assert len(result.drawn) == 1


def test_a_prompt_of_one_token_is_a_prefill() -> None:
    runner = simulated_runner(cost=COST)
    assert runner.step_s(whole(sequence("p", [1]))) == pytest.approx(1.1)


def test_layers_are_reported_in_order_spread_over_the_step() -> None:
    clock = ManualClock()
    runner = simulated_runner(clock=clock, cost=COST)
    seen: list[tuple[int, float]] = []
    run(runner, whole(sequence("p", [1] * 10)), lambda layer: seen.append((layer, clock.now())))
    assert seen == [(0, pytest.approx(1.0)), (1, pytest.approx(2.0))]


def test_a_launched_step_takes_its_time_whether_anybody_waits_or_not() -> None:
    clock = ManualClock()
    runner = simulated_runner(clock=clock, cost=COST, steps_ahead=1)
    plans = Plans()
    step = runner.launch(plans(Part(sequence("p", [1] * 10), 0, 10, True)))
    assert (step.done, step.begins_s, step.done_at_s, clock.now()) == (False, 0.0, pytest.approx(2.0), 0.0)
    clock.advance(5.0)
    assert step.done
    runner.collect(step)
    assert clock.now() == 5.0
    assert runner.steps_ahead == 1


def test_a_step_begins_when_the_one_before_it_is_over_or_when_it_is_launched() -> None:
    clock = ManualClock()
    runner = simulated_runner(clock=clock, cost=COST, steps_ahead=1)
    prompt, plans = Part(sequence("p", [1] * 10), 0, 10, True), Plans()
    first, second = runner.launch(plans(prompt)), runner.launch(plans(prompt))
    assert (second.begins_s, second.done_at_s) == (pytest.approx(2.0), pytest.approx(4.0))
    runner.collect(first)
    assert clock.now() == pytest.approx(2.0)
    runner.collect(second)
    clock.advance(3.0)
    third = runner.launch(plans(prompt))
    assert third.begins_s == clock.now() == pytest.approx(7.0)


def test_layers_of_a_step_that_is_collected_late_are_reported_at_once() -> None:
    clock = ManualClock()
    runner = simulated_runner(clock=clock, cost=COST)
    seen: list[tuple[int, float]] = []
    step = runner.launch(whole(sequence("p", [1] * 10)), lambda layer: seen.append((layer, clock.now())))
    assert seen == []
    clock.advance(1.5)
    runner.collect(step)
    assert seen == [(0, 1.5), (1, pytest.approx(2.0))]


def test_oversleeping_after_one_layer_is_made_up_for_after_the_next() -> None:
    clock = ManualClock()

    def oversleep(seconds: float) -> None:
        clock.advance(seconds + 0.25)

    runner = SimulatedRunner(layout(4, windows=(None,) * 4), 8, 64, VOCAB, COST, oversleep, clock=clock)
    run(runner, whole(sequence("p", [1] * 10)), lambda layer: None)
    assert clock.now() == pytest.approx(2.25)


def test_a_slow_listener_counts_into_the_time_of_the_step() -> None:
    clock = ManualClock()
    runner = simulated_runner(clock=clock, cost=COST)
    run(runner, whole(sequence("p", [1] * 10)), lambda layer: clock.advance(0.5))
    assert clock.now() == pytest.approx(2.5)


def test_without_a_clock_every_layer_sleeps_its_share() -> None:
    slept: list[float] = []
    runner = SimulatedRunner(layout(4, windows=(None,) * 4), 8, 64, VOCAB, COST, slept.append)
    run(runner, whole(sequence("p", [1] * 10)), lambda layer: None)
    assert slept == [pytest.approx(0.5)] * 4


def test_without_sleep_a_step_takes_no_time_and_still_reports_layers() -> None:
    seen: list[int] = []
    run(SimulatedRunner(layout(4), 8, 64, VOCAB, CostModel(step_s=1e6), None), whole(sequence("p", [1])), seen.append)
    assert seen == [0, 1]


def test_tokens_depend_on_all_tokens_so_far_and_on_the_seed_alone() -> None:
    prompt = list(range(12))
    first = run_alone(prompt, sampling(seed=3))
    assert first == run_alone(prompt, sampling(seed=3))
    assert first != run_alone(prompt, sampling(seed=4))
    assert first != run_alone([49, *prompt[1:]], sampling(seed=3))
    for cut in (1, 20, 63):
        assert draw(simulated_runner(), [*prompt, *first[:cut]], sampling(seed=3)) == first[cut]


def test_greedy_outputs_do_not_depend_on_the_seed() -> None:
    assert run_alone([1, 2], sampling(1, 0.0)) == run_alone([1, 2], sampling(2, 0.0))


def test_a_row_goes_on_from_the_tokens_that_it_drew_as_one_admitted_with_them_does() -> None:
    runner, growing = simulated_runner(), sequence("g", [1, 5], sampling=sampling())
    plans = PlanWriter()
    growing.tables = [[0]]
    for end in range(2, 7):
        start = end - 1 if end > 2 else 0
        (drawn,) = runner.collect(runner.launch(plans.write((Part(growing, start, end - start, True),)))).drawn
        assert drawn.token == draw(simulated_runner(), growing.tokens, sampling())
        growing.tokens.append(drawn.token)


def test_tokens_cover_the_vocabulary_without_its_ends() -> None:
    runner = simulated_runner()
    counts = Counter(draw(runner, [a, b], sampling()) for a in range(VOCAB) for b in range(30))
    assert set(counts) == set(range(VOCAB)) - EOS
    assert max(counts.values()) < 4 * min(counts.values())


def test_ends_of_sequence_come_about_as_often_as_asked_and_never_under_min_tokens() -> None:
    runner = simulated_runner(eos_chance=0.25)
    drawn = [draw(runner, [a, b], sampling()) for a in range(VOCAB) for b in range(20)]
    assert 0.2 < sum(token in EOS for token in drawn) / len(drawn) < 0.3
    assert not {draw(runner, [a], sampling(min_tokens=1)) for a in range(VOCAB)} & EOS


def test_stop_ids_are_not_drawn_under_min_tokens() -> None:
    runner = simulated_runner()
    banned = tuple(range(40))
    drawn = {draw(runner, [a], sampling(min_tokens=1, stop_token_ids=banned)) for a in range(VOCAB)}
    assert drawn <= set(range(40, VOCAB))
    assert draw(runner, [1], sampling(min_tokens=1, stop_token_ids=tuple(range(VOCAB)))) in range(VOCAB)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("eos_chance", [0.0, 0.5])
def test_logprobs_are_a_distribution_that_holds_the_drawn_token(temperature: float, eos_chance: float) -> None:
    runner = simulated_runner(eos_chance=eos_chance)
    for token in range(VOCAB):
        params = sampling(temperature=temperature, logprobs=20)
        drawn = run(runner, whole(sequence("s", [token], sampling=params))).drawn[0]
        assert drawn.logprobs is not None
        top = dict(drawn.logprobs.top)
        values = [logprob for _, logprob in drawn.logprobs.top]
        assert len(top) == 20
        assert values == sorted(values, reverse=True)
        assert sum(math.exp(value) for value in values) <= 1
        assert top.get(drawn.token, drawn.logprobs.logprob) == drawn.logprobs.logprob


def test_logprobs_come_only_when_asked_for_and_do_not_change_the_draw() -> None:
    runner = simulated_runner()
    plain = run(runner, whole(sequence("a", [1, 2], sampling=sampling()))).drawn[0]
    asked = run(runner, whole(sequence("b", [1, 2], sampling=sampling(logprobs=0)))).drawn[0]
    assert plain.logprobs is None
    assert asked.logprobs is not None
    assert asked.logprobs.top == ()
    assert plain.token == asked.token


def test_an_end_of_sequence_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(ValueError, match="eos_token_ids"):
        SimulatedRunner(layout(4), 8, 64, VOCAB, COST, None, frozenset({VOCAB}))
    with pytest.raises(ValueError, match="eos_chance"):
        SimulatedRunner(layout(4), 8, 64, VOCAB, COST, None, eos_chance=0.5)
