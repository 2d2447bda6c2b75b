"""What happened to every generation: enough to start it again elsewhere, and to say afterwards where it was served.

An entry is open while the generation lives; closed ones stay in a bounded ring as plain data. Owned by the loop's thread.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from core.messages import ServedBy
from core.request import Request
from core.request_times import RequestTimes, Stage
from router.policy import Assignment
from router.state import InstanceKey

RECENT = 1024


class Outcome(Enum):
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


@dataclass(eq=False)
class Entry:
    """One generation. `tokens` are those received in order, all of which may have been sent to the client.

    `served` maps a worker to what it reported; `assignments` has one element per attempt, the last being the present one.
    """

    request: Request
    times: RequestTimes = field(default_factory=RequestTimes)
    tokens: list[int] = field(default_factory=list)
    assignments: list[Assignment] = field(default_factory=list)
    served: dict[InstanceKey, ServedBy] = field(default_factory=dict)
    outcome: Outcome | None = None
    finish: str | None = None
    error: str | None = None

    @property
    def cached_tokens(self) -> int:
        """Of the prompt. A later attempt may find more cached than that: what was generated before."""
        found = max((report.cached_tokens for report in self.served.values()), default=0)
        return min(found, len(self.request.prompt))

    @property
    def kv_bytes(self) -> int:
        return sum(report.kv_bytes for report in self.served.values())

    def summary(self) -> dict[str, object]:
        """Plain data for `/debug/requests` and the `hetserve` object of a traced response."""
        last = self.assignments[-1] if self.assignments else None
        return {
            "id": self.request.request_id,
            "outcome": self.outcome.value if self.outcome else "running",
            "finish_reason": self.finish,
            "error": self.error,
            "prefill": None if last is None else (last.prefill or last.decode).name,
            "decode": None if last is None else last.decode.name,
            "local": last is not None and last.prefill is None,
            "attempts": len(self.assignments),
            "why": None if last is None else last.why,
            "prompt_tokens": len(self.request.prompt),
            "tokens": len(self.tokens),
            "cached_tokens": self.cached_tokens,
            "kv_bytes": self.kv_bytes,
            "transfer_s": sum(report.transfer_s for report in self.served.values()),
            "queue_s": max((report.queue_s for report in self.served.values()), default=0.0),
            "ttft_s": self.times.ttft_s,
            "tpot_s": self.times.tpot_s,
            "total_s": self.times.total_s,
            "predicted_ttft_s": None if last is None else last.ttft_s,
            "predicted_tpot_s": None if last is None else last.tpot_s,
        }


class Journal:
    """Open entries by generation id, the recent closed ones, and how many there ever were of each outcome."""

    def __init__(self, recent: int = RECENT) -> None:
        self.open: dict[str, Entry] = {}
        self._recent: deque[dict[str, object]] = deque(maxlen=recent)
        self.accepted = 0
        self.outcomes: dict[Outcome, int] = dict.fromkeys(Outcome, 0)

    def begin(self, entry: Entry) -> None:
        """Open the entry. Every entry is opened exactly once."""
        entry.times.mark(Stage.ARRIVED, entry.request.arrived_s)
        self.open[entry.request.request_id] = entry
        self.accepted += 1

    def end(self, entry: Entry, outcome: Outcome, now_s: float, error: str | None = None) -> None:
        """Close the entry. Every entry is closed exactly once."""
        del self.open[entry.request.request_id]
        entry.outcome, entry.error = outcome, error
        entry.times.mark(Stage.FINISHED, now_s)
        self.outcomes[outcome] += 1
        self._recent.append(entry.summary())

    def recent(self) -> list[dict[str, object]]:
        """Newest first."""
        return list(reversed(self._recent))
