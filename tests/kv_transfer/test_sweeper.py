"""The timer thread: it sleeps until somebody needs it, and ends when told."""

from __future__ import annotations

import threading

from kv_transfer.sweeper import Sweeper


def test_it_sweeps_when_asked_and_again_when_the_sweep_says_so() -> None:
    swept = threading.Semaphore(0)
    answers = [0.0, 0.01, None]

    def sweep() -> float | None:
        answer = answers.pop(0)
        swept.release()
        return answer

    sweeper = Sweeper(sweep, "test")
    sweeper.wake_within(3600)
    sweeper.wake_within(0)  # the sooner one counts
    for _ in range(3):
        assert swept.acquire(timeout=20)
    assert answers == []
    sweeper.stop()


def test_it_does_not_sweep_unasked_and_stops_while_it_sleeps() -> None:
    swept = threading.Event()

    def sweep() -> float | None:
        swept.set()
        return None

    sweeper = Sweeper(sweep, "test")
    sweeper.wake_within(3600)
    sweeper.stop()
    sweeper.stop()
    assert not swept.is_set()
