"""The table of open grants: each has a lease of its own."""

from __future__ import annotations

import pytest

from core.clock import ManualClock
from core.errors import LeaseExpired
from kv_transfer.events import Broken, Received
from kv_transfer.grants import GrantTable
from kv_transfer.terms import Terms
from tests.kv_transfer.rig import layout, poisoned


def test_the_lease_of_each_runs_by_itself_and_the_nearest_is_told() -> None:
    clock = ManualClock(1000.0)
    events: list[Received | Broken] = []
    table = GrantTable(poisoned(layout()), clock, events.append)
    for number, lease_s in ((1, 9.0), (2, 3.0), (3, 6.0)):
        table.open(Terms(number, f"a{number}", 0, 8, lease_s), [[2 * number, 2 * number + 1]])
    assert table.expire() == pytest.approx(3.0)
    clock.advance(2.0)
    assert table.renew(2)
    assert table.expire() == pytest.approx(3.0)
    clock.advance(3.5)
    assert table.expire() == pytest.approx(0.5)
    (broken,) = events
    assert isinstance(broken, Broken)
    assert (broken.grant, type(broken.error)) == (2, LeaseExpired)
    assert not table.renew(2)
    assert len(table) == 2
    clock.advance(10.0)
    assert table.expire() is None
    assert [event.grant for event in events] == [2, 1, 3]
