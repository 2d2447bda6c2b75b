"""The device's threads: order, failures, signs of life, and steps that overlap with whoever launches them. No timed assertions:
what a step waits for is an event of the test's."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from core.clock import ManualClock
from core.config import EngineConfig
from core.cost import CostModel
from core.errors import EngineFault
from core.sampling import SamplingParams
from engine.device import Device
from engine.engine import Engine
from engine.plan import Admitted, BlocksAdded, Handle, LayerListener, Scheduled, StepPlan, StepResult
from engine.simulated_runner import SimulatedRunner, SimulatedStep
from tests.support.engines import EOS, VOCAB, layout, run_alone, sequence

PROMPT = list(range(10, 20))
PATIENCE_S = 20.0


class GatedRunner(SimulatedRunner):
    """Steps take no time, but each is collected only once the test opens its gate. Writes down what happened, and where."""

    def __init__(self, steps_ahead: int) -> None:
        super().__init__(layout(4), 64, 256, VOCAB, CostModel(), None, EOS, steps_ahead=steps_ahead)
        self.gate = threading.Semaphore(0)
        self.log: list[tuple[str, int]] = []
        self.threads: set[str] = set()
        self.breaks: dict[str, BaseException] = {}
        self.reached = threading.Event()
        self._numbers: dict[SimulatedStep, int] = {}

    def launch(self, plan: StepPlan, on_layer: LayerListener | None = None) -> SimulatedStep:
        self.threads.add(threading.current_thread().name)
        step = super().launch(plan, on_layer)
        self._numbers[step] = plan.step
        self._note("launch", plan.step)
        return step

    def collect(self, handle: Handle) -> StepResult:
        self.threads.add(threading.current_thread().name)
        assert isinstance(handle, SimulatedStep)
        self._note("wait", self._numbers[handle])
        assert self.gate.acquire(timeout=PATIENCE_S)
        result = super().collect(handle)
        self._note("collect", self._numbers.pop(handle))
        return result

    def _note(self, what: str, step: int) -> None:
        self.log.append((what, step))
        self.reached.set()
        if f"{what} {step}" in self.breaks:
            raise self.breaks[f"{what} {step}"]

    def wait_for(self, *entry: object) -> None:
        while entry not in self.log:
            assert self.reached.wait(PATIENCE_S), f"{entry} is not in {self.log}"
            self.reached.clear()


def plan(step: int, *, first: bool = False) -> StepPlan:
    """A row of ten tokens, and then a token a step."""
    if not first:
        return StepPlan(step, (Scheduled(0, 8 + step, 1, True),))
    admitted = Admitted(0, tuple(PROMPT), len(PROMPT), SamplingParams(max_tokens=64))
    return StepPlan(step, (Scheduled(0, 0, 10, True),), (), (admitted,), (BlocksAdded(0, 0, (0, 1, 2)),))


@contextmanager
def device(runner: SimulatedRunner, **options: object) -> Iterator[Device]:
    it = Device(runner, **options)
    yield it
    if isinstance(runner, GatedRunner):
        runner.gate.release(100)
    assert it.close(PATIENCE_S)


def test_a_launch_returns_before_its_step_is_over_and_the_next_is_launched_meanwhile() -> None:
    runner = GatedRunner(steps_ahead=1)
    with device(runner) as it:
        first, second = it.launch(plan(1, first=True)), it.launch(plan(2))
        runner.wait_for("wait", 1)
        runner.wait_for("launch", 2)
        assert (first.done, second.done) == (False, False)
        runner.gate.release(2)
        tokens = [it.collect(step).drawn[0].token for step in (first, second)]
        assert (first.done, second.done) == (True, True)
    assert tokens == run_alone(PROMPT, SamplingParams(max_tokens=2))


def test_without_a_step_ahead_one_thread_ends_a_step_before_it_launches_the_next() -> None:
    runner = GatedRunner(steps_ahead=0)
    with device(runner) as it:
        steps = [it.launch(plan(1, first=True)), it.launch(plan(2))]
        runner.gate.release(2)
        for step in steps:
            it.collect(step)
    assert runner.log == [(what, step) for step in (1, 2) for what in ("launch", "wait", "collect")]
    assert len(runner.threads) == 1


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("where", ["launch", "collect"])
@pytest.mark.parametrize("error", [RuntimeError("device-side assert"), SystemExit("gone")])
def test_a_step_that_raises_fails_its_handle_and_not_the_thread(steps_ahead: int, where: str, error: BaseException) -> None:
    runner = GatedRunner(steps_ahead)
    runner.breaks[f"{where} 1"] = error
    runner.gate.release(5)
    done = threading.Semaphore(0)
    with device(runner, on_done=done.release) as it:
        broken, whole = it.launch(plan(1, first=True)), it.launch(plan(2))
        with pytest.raises(type(error)):
            it.collect(broken)
        assert len(it.collect(whole).drawn) == 1
        assert all(done.acquire(timeout=PATIENCE_S) for _ in range(2)), "both are reported"


def test_every_thread_that_uses_the_runner_is_bound_first() -> None:
    runner, bound = GatedRunner(steps_ahead=1), []
    runner.gate.release(1)
    with device(runner, bind_thread=lambda: bound.append(threading.current_thread().name)) as it:
        it.collect(it.launch(plan(1, first=True)))
    assert set(bound) == runner.threads
    assert len(bound) == 2


def test_closed_it_ends_what_was_launched_and_fails_what_comes_later() -> None:
    runner = GatedRunner(steps_ahead=1)
    it = Device(runner)
    step = it.launch(plan(1, first=True))
    runner.wait_for("wait", 1)
    assert not it.close(0.01), "a step that does not end keeps it"
    runner.gate.release()
    assert it.close(PATIENCE_S)
    assert len(it.collect(step).drawn) == 1
    with pytest.raises(EngineFault, match="closed"):
        it.collect(it.launch(plan(2)))


def test_an_engine_decides_on_the_next_step_while_the_device_computes_the_last() -> None:
    runner, woken = GatedRunner(steps_ahead=1), threading.Event()
    with device(runner, on_done=woken.set) as it:
        engine = Engine(it, EngineConfig(), ManualClock())
        engine.add(sequence("a", PROMPT, 5))
        assert [engine.launch() for _ in range(3)] == [True, True, False]
        runner.wait_for("launch", 2)
        assert (engine.in_flight, engine.ready) == (2, False)
        tokens = []
        while engine.has_work:
            runner.gate.release()
            while not engine.ready:
                assert woken.wait(PATIENCE_S)
                woken.clear()
            tokens += [new.token for new in engine.collect().tokens]
            engine.launch()
        assert tokens == run_alone(PROMPT, SamplingParams(max_tokens=5))
        assert engine.invariants() == []
    assert [step for what, step in runner.log if what == "launch"] == [1, 2, 3, 4, 5], "none past the last token"
