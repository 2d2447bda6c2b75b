"""Latency metrics follow from timestamps."""

from __future__ import annotations

import pytest

from core.lifecycle import Lifecycle, Stage
from core.slo import SLO


def test_ttft_and_tpot_follow_from_the_token_times() -> None:
    life = Lifecycle()
    life.mark(Stage.ARRIVED, 10.0)
    for at_s in (10.5, 10.7, 11.1):
        life.token(at_s)
    life.mark(Stage.FINISHED, 11.2)
    assert life.ttft_s == pytest.approx(0.5)
    assert life.tpot_s == pytest.approx(0.3)
    assert life.gaps_s == pytest.approx([0.2, 0.4])
    assert life.total_s == pytest.approx(1.2)


def test_one_token_has_no_time_per_output_token() -> None:
    life = Lifecycle()
    life.mark(Stage.ARRIVED, 0.0)
    life.token(1.0)
    assert life.tpot_s is None
    assert life.total_s is None


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
