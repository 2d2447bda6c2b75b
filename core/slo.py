"""Latency targets. A request meets its SLO when it meets every target that is set."""

from __future__ import annotations

import msgspec

from core.errors import InvalidRequest


class SLO(msgspec.Struct, frozen=True, kw_only=True):
    """Targets in seconds; None is no target.

    `ttft_s` bounds the time to the first token, `tpot_s` the mean time per output token after it, `deadline_s` the whole.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("ttft_s", self.ttft_s), ("tpot_s", self.tpot_s), ("deadline_s", self.deadline_s)):
            if value is not None and not value > 0:
                raise InvalidRequest(f"Got {name} = {value} but expected a positive number of seconds", name)

    def met_by(self, ttft_s: float, tpot_s: float, total_s: float) -> bool:
        return (
            (self.ttft_s is None or ttft_s <= self.ttft_s)
            and (self.tpot_s is None or tpot_s <= self.tpot_s)
            and (self.deadline_s is None or total_s <= self.deadline_s)
        )
