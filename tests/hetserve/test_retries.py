from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetserve.retries import Retries, may_retry, retry_after_s

NOW = datetime(2026, 1, 1, tzinfo=UTC)


@given(tried=st.integers(1, 50), jitter=st.floats(0, 1, exclude_max=True))
def test_waits_double_up_to_the_cap_and_jitter_only_shortens(tried: int, jitter: float) -> None:
    full_s = min(0.5 * 2 ** (tried - 1), 8.0)
    got_s = Retries(limit=50).delay_s(tried, None, jitter)
    assert got_s is not None
    assert 0.75 * full_s <= got_s <= full_s


def test_the_limit_counts_tries_after_the_first() -> None:
    assert Retries(limit=1).delay_s(1, None, 0.0) == 0.5
    assert Retries(limit=1).delay_s(2, None, 0.0) is None
    assert Retries(limit=0).delay_s(1, 1.0, 0.0) is None


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after-ms": "1500", "retry-after": "9"}, 1.5),
        ({"retry-after": format_datetime(NOW + timedelta(seconds=30), usegmt=True)}, 30.0),
        ({"retry-after": format_datetime(NOW - timedelta(seconds=30), usegmt=True)}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-1"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after-ms": "nan", "retry-after": "9"}, 9.0),
        ({"retry-after": "Mon, 01 Jan 99999999999 00:00:00 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 2020 00:00:00 +99999999999999999999"}, None),
        ({"retry-after": "Thu, 01 Jan 2026 00:00:05"}, 5.0),
        ({"retry-after": " "}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after_s(headers, now=lambda: NOW) == seconds


def test_the_servers_word_wins_over_the_status() -> None:
    assert may_retry(503, {})
    assert not may_retry(400, {})
    assert may_retry(400, {"x-should-retry": "true"})
    assert not may_retry(503, {"x-should-retry": "false"})
