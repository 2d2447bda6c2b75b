"""A simulated device in virtual time: a step takes the time that its cost model says, and its owner is told when it is over."""

from __future__ import annotations

from collections.abc import Callable

from core.cost import CostModel
from core.layout import KVLayout
from engine.plan import LayerListener, StepPlan
from engine.simulated_runner import SimulatedRunner, SimulatedStep
from tests.support.virtual.timeline import Timeline


class VirtualDevice(SimulatedRunner):
    """`on_done` is called at the end of each step."""

    def __init__(
        self,
        timeline: Timeline,
        on_done: Callable[[], None],
        layout: KVLayout,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        cost: CostModel,
        steps_ahead: int,
    ) -> None:
        super().__init__(
            layout, num_blocks, max_model_len, vocab_size, cost, _nobody_sleeps, clock=timeline, steps_ahead=steps_ahead
        )
        self._timeline = timeline
        self._on_done = on_done

    def launch(self, plan: StepPlan, on_layer: LayerListener | None = None) -> SimulatedStep:
        step = super().launch(plan, on_layer)
        self._timeline.at(step.done_at_s, self._on_done)
        return step


def _nobody_sleeps(seconds: float) -> None:
    if seconds > 1e-9:
        raise AssertionError(f"somebody waits {seconds} s for a device in virtual time")
