"""What a run adds up to. Pure arithmetic over outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hetserve.bench.measure import Outcome


@dataclass(frozen=True)
class Targets:
    """An SLO in seconds; None is no target. A request that failed meets none."""

    ttft_s: float | None = None
    tpot_s: float | None = None

    def met_by(self, outcome: Outcome) -> bool:
        if outcome.error is not None:
            return False
        ttft_met = self.ttft_s is None or (outcome.ttft_s is not None and outcome.ttft_s <= self.ttft_s)
        return ttft_met and (self.tpot_s is None or outcome.tpot_s is None or outcome.tpot_s <= self.tpot_s)


@dataclass(frozen=True)
class Spread:
    """Seconds, over `count` samples."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


@dataclass(frozen=True)
class Report:
    """One run.

    Attributes:
        duration_s: from the first request sent to the last answered.
        goodput: requests a second that met the targets; `attainment` is their share of all that were sent.
        spreads: by the names `ttft`, `tpot`, `itl`, `e2e`, over complete answers; a name without samples is absent.
        lag: how late requests were sent: the load generator's own fault, large when this machine is too busy to measure.
        errors: how many requests ended in each kind of error.
    """

    requests: int
    completed: int
    duration_s: float
    requests_per_s: float
    goodput: float
    attainment: float
    input_tokens: int
    output_tokens: int
    input_tokens_per_s: float
    output_tokens_per_s: float
    spreads: dict[str, Spread]
    lag: Spread
    errors: dict[str, int]
    targets: Targets

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report(outcomes: Sequence[Outcome], targets: Targets) -> Report:
    """Raises ValueError on an empty run."""
    if not outcomes:
        raise ValueError("Got no outcomes but expected at least one")
    complete = [outcome for outcome in outcomes if outcome.error is None]
    duration_s = max(outcome.done_s for outcome in outcomes) - min(outcome.sent_s for outcome in outcomes)
    met = sum(targets.met_by(outcome) for outcome in outcomes)
    input_tokens = sum(outcome.prompt_tokens for outcome in complete)
    output_tokens = sum(outcome.output_tokens for outcome in complete)
    samples = {
        "ttft": [outcome.ttft_s for outcome in complete if outcome.ttft_s is not None],
        "tpot": [outcome.tpot_s for outcome in complete if outcome.tpot_s is not None],
        "itl": [gap_s for outcome in complete for gap_s in outcome.gaps_s],
        "e2e": [outcome.e2e_s for outcome in complete],
    }
    return Report(
        requests=len(outcomes),
        completed=len(complete),
        duration_s=duration_s,
        requests_per_s=_rate(len(complete), duration_s),
        goodput=_rate(met, duration_s),
        attainment=met / len(outcomes),
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        input_tokens_per_s=_rate(input_tokens, duration_s),
        output_tokens_per_s=_rate(output_tokens, duration_s),
        spreads={name: spread(values) for name, values in samples.items() if values},
        lag=spread(max(0.0, outcome.sent_s - outcome.due_s) for outcome in outcomes),
        errors=dict(Counter(outcome.error for outcome in outcomes if outcome.error is not None).most_common()),
        targets=targets,
    )


def spread(values: Iterable[float]) -> Spread:
    ordered = sorted(values)
    return Spread(
        count=len(ordered),
        mean=sum(ordered) / len(ordered),
        p50=percentile(ordered, 50),
        p90=percentile(ordered, 90),
        p99=percentile(ordered, 99),
        max=ordered[-1],
    )


def percentile(ordered: Sequence[float], percent: float) -> float:
    """Of values in ascending order, interpolated linearly between the closest ranks (numpy's default)."""
    if not ordered:
        raise ValueError("Got no values but expected at least one")
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


def _rate(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
