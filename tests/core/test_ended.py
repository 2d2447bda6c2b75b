"""Ends are remembered for a lease after they were last asked about, and in bounded number."""

from __future__ import annotations

from core.clock import ManualClock
from core.ended import Ended, EndedAttempts

LEASE_S = 5.0


def test_an_end_is_remembered_for_a_lease_after_it_was_last_asked_about() -> None:
    clock = ManualClock()
    ended = EndedAttempts(clock, LEASE_S)
    for name in ("a", "b"):
        ended.remember(name, Ended(name))
    clock.advance(4.0)
    assert ended.ask("a") == Ended("a")
    clock.advance(1.0)
    ended.sweep()
    assert ended.ask("b") is None
    clock.advance(3.9)
    ended.sweep()
    assert len(ended) == 1
    clock.advance(0.1)
    ended.sweep()
    assert len(ended) == 0


def test_the_longest_unasked_make_room() -> None:
    ended = EndedAttempts(ManualClock(), LEASE_S, capacity=3)
    for name in ("a", "b", "c"):
        ended.remember(name, Ended(name))
    ended.ask("a")
    ended.remember("d", Ended("d"))
    assert len(ended) == 3
    assert ended.ask("b") is None
    assert ended.ask("a") == Ended("a")
