from __future__ import annotations

import os
import signal

import pytest

from hetserve.commands.interrupts import Interrupts


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_only_asks_unless_it_may_interrupt(number: int) -> None:
    before = signal.getsignal(number)
    with Interrupts().installed() as interrupts:
        os.kill(os.getpid(), number)
        assert interrupts.asked.is_set()
        with pytest.raises(KeyboardInterrupt), interrupts.at_once():
            pytest.fail("a signal that came before must end it on entry")
    assert signal.getsignal(number) is before


def signal_self_while_interruptible(interrupts: Interrupts) -> None:
    with interrupts.at_once():
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the signal must have raised")


def test_where_it_may_interrupt_it_does_so_once() -> None:
    with Interrupts().installed() as interrupts:
        with pytest.raises(KeyboardInterrupt):
            signal_self_while_interruptible(interrupts)
        os.kill(os.getpid(), signal.SIGTERM)  # while cleaning up: asked again, but nothing raised
        assert interrupts.asked.is_set()
