"""What the fleet makes of pings that nobody answers, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from cluster.fleet import Fleet, _Live
from cluster.orders import Event, Silent
from core.clock import ManualClock


class FakeCalls:
    """Actor calls as Ray makes them: each has a reference; those in `answered` have resolved."""

    def __init__(self) -> None:
        self.made: list[object] = []
        self.answered: set[object] = set()

    def remote(self) -> object:
        self.made.append(object())
        return self.made[-1]

    def wait(self, references: list[object], **_: Any) -> tuple[list[object], list[object]]:
        return [r for r in references if r in self.answered], [r for r in references if r not in self.answered]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCalls]:
    calls = FakeCalls()
    monkeypatch.setattr(ray, "wait", calls.wait)
    monkeypatch.setattr(ray, "get", lambda reference: 0.0)
    return calls


def fleet_of_one(clock: ManualClock, calls: FakeCalls) -> Fleet:
    fleet = Fleet(clock, ping_period_s=0.5, silent_after_s=3.0)
    order: Any = SimpleNamespace(name="d0", incarnation=1)
    fleet._live["d0"] = _Live(order, SimpleNamespace(ping=calls), fate=object(), ready=True)
    return fleet


def listen(fleet: Fleet, clock: ManualClock, polls: int, every_s: float) -> list[Event]:
    events: list[Event] = []
    for _ in range(polls):
        clock.advance(every_s)
        events += fleet.poll(0.0)
    return events


def test_a_process_that_answers_no_ping_is_silent_after_the_configured_time(calls: FakeCalls) -> None:
    clock = ManualClock()
    fleet = fleet_of_one(clock, calls)
    assert listen(fleet, clock, 5 + 29, 0.1) == []
    silent = listen(fleet, clock, 2, 0.1)[0]
    assert isinstance(silent, Silent)
    assert silent.for_s == pytest.approx(3.0, abs=0.11)
    assert len(calls.made) == 1


def test_answers_end_a_silence(calls: FakeCalls) -> None:
    clock = ManualClock()
    fleet = fleet_of_one(clock, calls)
    for _ in range(5):
        assert not [event for event in listen(fleet, clock, 25, 0.1) if isinstance(event, Silent)]
        calls.answered.update(calls.made)


def test_time_in_which_the_controller_itself_stood_still_is_nobody_s_silence(calls: FakeCalls) -> None:
    clock = ManualClock()
    fleet = fleet_of_one(clock, calls)
    listen(fleet, clock, 6, 0.1)
    assert calls.made
    assert listen(fleet, clock, 3, 60.0) == []
