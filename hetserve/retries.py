"""When to try again, and when to give up: pure, so that both clients share it. The rules are the openai client's.

Tried again: no connection, a connection cut before an answer, a timeout, and the statuses 408, 409, 429 and 5xx. The
server's `x-should-retry` header overrules the status. Waiting is exponential with jitter, or what `Retry-After` says; a
server that asks for more than `retry_after_cap_s` is not waited for at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime


@dataclass(frozen=True)
class Retries:
    """`limit` tries after the first. The n-th wait is `first_s * 2**n`, at most `cap_s`, less up to a quarter."""

    limit: int = 2
    first_s: float = 0.5
    cap_s: float = 8.0
    retry_after_cap_s: float = 60.0

    def delay_s(self, tried: int, retry_after_s: float | None, jitter: float) -> float | None:
        """Seconds to wait after `tried` tries; None to give up. `jitter` is a draw from [0, 1)."""
        if tried > self.limit:
            return None
        if retry_after_s is not None:
            return retry_after_s if retry_after_s <= self.retry_after_cap_s else None
        wait_s: float = min(self.first_s * 2 ** (tried - 1), self.cap_s)
        return wait_s * (1 - 0.25 * jitter)


def may_retry(status: int, headers: Mapping[str, str]) -> bool:
    """Whether another try can help, by the answer's own account."""
    told = headers.get("x-should-retry")
    if told in ("true", "false"):
        return told == "true"
    return status in (408, 409, 429) or status >= 500


def retry_after_s(headers: Mapping[str, str], now: Callable[[], datetime] = lambda: datetime.now(UTC)) -> float | None:
    """`Retry-After` in seconds, from either of its forms (or `retry-after-ms`); None where absent or unreadable."""
    for header, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(header)
        if value is None:
            continue
        try:
            seconds = float(value) * scale
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        when = parsedate_to_datetime(value)
    except (ValueError, OverflowError):  # the latter of years and zones beyond any calendar
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=UTC)
    return max(0.0, (when - now()).total_seconds())
