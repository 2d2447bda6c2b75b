"""Plans for a runner by itself, without scheduler and engine."""

from __future__ import annotations

from engine.decision import Part
from engine.plan import Admitted, BlocksAdded, ModelRunner, Scheduled, StepPlan, StepResult


class Plans:
    """Each plan drops the rows of the one before and admits its own sequences, with all their tokens and blocks: so one
    sequence may compute the same tokens again and again."""

    def __init__(self) -> None:
        self._rows = 0
        self._step = 0

    def __call__(self, *parts: Part) -> StepPlan:
        dropped = tuple(range(self._rows))
        self._rows, self._step = len(parts), self._step + 1
        owners = [part.sequence for part in parts]
        return StepPlan(
            self._step,
            tuple(Scheduled(row, part.start, part.count, part.samples) for row, part in enumerate(parts)),
            dropped,
            tuple(Admitted(row, tuple(s.tokens), s.prompt_tokens, s.sampling) for row, s in enumerate(owners)),
            tuple(BlocksAdded(row, 0, tuple(table), g) for row, s in enumerate(owners) for g, table in enumerate(s.tables)),
        )


def run(runner: ModelRunner, plan: StepPlan) -> StepResult:
    return runner.collect(runner.launch(plan))
