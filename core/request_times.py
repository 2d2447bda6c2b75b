"""One request's timestamps, and every metric derived from them (after DistServe's lifetime events).

All times are of one clock, the gateway's. What happens on other machines is known by the durations that they report.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Stage(Enum):
    ARRIVED = "arrived"
    ASSIGNED = "assigned"
    FIRST_TOKEN = "first_token"
    LAST_TOKEN = "last_token"
    FINISHED = "finished"


@dataclass
class RequestTimes:
    """Timestamps in seconds, the first of each stage winning except `LAST_TOKEN`, which moves; plus the number of tokens."""

    marks_s: dict[Stage, float] = field(default_factory=dict)
    tokens: int = 0

    def mark(self, stage: Stage, now_s: float) -> None:
        self.marks_s.setdefault(stage, now_s)

    def token(self, now_s: float, count: int = 1) -> None:
        """Record that `count` tokens arrived at once."""
        self.mark(Stage.FIRST_TOKEN, now_s)
        self.marks_s[Stage.LAST_TOKEN] = now_s
        self.tokens += count

    @property
    def ttft_s(self) -> float | None:
        return self._between(Stage.ARRIVED, Stage.FIRST_TOKEN)

    @property
    def tpot_s(self) -> float | None:
        """Mean time per output token after the first; None before there are two."""
        span_s = self._between(Stage.FIRST_TOKEN, Stage.LAST_TOKEN)
        return None if span_s is None or self.tokens < 2 else span_s / (self.tokens - 1)

    @property
    def total_s(self) -> float | None:
        return self._between(Stage.ARRIVED, Stage.FINISHED)

    def _between(self, start: Stage, end: Stage) -> float | None:
        if start not in self.marks_s or end not in self.marks_s:
            return None
        return self.marks_s[end] - self.marks_s[start]
