"""Latency metrics follow from timestamps."""

from __future__ import annotations

import pytest

from core.request_times import RequestTimes, Stage
from core.slo import SLO


def test_ttft_and_tpot_follow_from_the_token_times() -> None:
    times = RequestTimes()
    times.mark(Stage.ARRIVED, 10.0)
    for at_s in (10.5, 10.7, 11.1):
        times.token(at_s)
    times.mark(Stage.FINISHED, 11.2)
    assert times.ttft_s == pytest.approx(0.5)
    assert times.tpot_s == pytest.approx(0.3)
    assert times.total_s == pytest.approx(1.2)


def test_one_token_has_no_time_per_output_token() -> None:
    times = RequestTimes()
    times.mark(Stage.ARRIVED, 0.0)
    times.token(1.0)
    assert times.tpot_s is None
    assert times.total_s is None


@pytest.mark.parametrize(
    ("slo", "met"),
    [
        (SLO(), True),
        (SLO(ttft_s=0.5), True),
        (SLO(ttft_s=0.4), False),
        (SLO(tpot_s=0.09), False),
        (SLO(deadline_s=0.9), False),
        (SLO(ttft_s=1, tpot_s=1, deadline_s=1), True),
    ],
)
def test_an_slo_is_met_when_every_target_is(slo: SLO, met: bool) -> None:
    assert slo.met_by(ttft_s=0.5, tpot_s=0.1, total_s=1.0) is met
