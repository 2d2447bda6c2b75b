"""Each fault does what it says, and nothing more."""

from __future__ import annotations

import pytest

from core.errors import TransferError
from kv_transfer.transports.fault import (
    Delay,
    Drop,
    Duplicate,
    Fault,
    FaultTransport,
    FlipBit,
    Message,
    Reorder,
    Trickle,
    Truncate,
)
from kv_transfer.transports.inproc import InprocTransport


def delivered(fault: Fault, pauses: list[float] | None = None) -> bytes:
    """What arrives of the messages `ab`, `cd`, `ef` when the second meets the fault."""
    slept: list[float] = [] if pauses is None else pauses
    transport = FaultTransport(InprocTransport(), lambda message: fault if message.index == 1 else None, slept.append)
    listener = transport.listen()
    near = transport.connect(listener.endpoint)
    far = listener.accept()
    try:
        for text in (b"ab", b"cd", b"ef"):
            near.send([text[:1], text[1:]])
    except TransferError:
        assert isinstance(fault, Truncate)
    near.close()
    listener.close()
    got = b""
    byte = bytearray(1)
    while True:
        try:
            far.recv_into(memoryview(byte))
        except TransferError:
            far.close()
            return got
        got += bytes(byte)


@pytest.mark.parametrize(
    ("fault", "arrives"),
    [
        (Drop(), b"abef"),
        (Duplicate(), b"abcdcdef"),
        (Reorder(), b"abefcd"),
        (Truncate(1), b"abc"),
        (Truncate(0), b"ab"),
        (FlipBit(0), b"abbdef"),
        (FlipBit(9), b"abcfef"),
        (FlipBit(16), b"abbdef"),
    ],
)
def test_a_fault_changes_its_message_and_no_other(fault: Fault, arrives: bytes) -> None:
    assert delivered(fault) == arrives


def test_delay_and_trickle_change_only_the_time() -> None:
    pauses: list[float] = []
    assert delivered(Delay(2.0), pauses) == b"abcdef"
    assert pauses == [2.0]
    pauses.clear()
    assert delivered(Trickle(1, 0.5), pauses) == b"abcdef"
    assert pauses == [0.5, 0.5]


def test_the_plan_sees_every_message_of_both_sides_in_order() -> None:
    seen: list[Message] = []
    transport = FaultTransport(InprocTransport(), lambda message: seen.append(message))
    listener = transport.listen()
    near = transport.connect(listener.endpoint)
    far = listener.accept()
    near.send([b"abc"])
    near.send([b""])
    far.send([b"de"], wait=False)
    assert seen == [Message(0, 0, 3, True), Message(0, 1, 0, True), Message(1, 0, 2, False)]
    for closing in (near, far, listener):
        closing.close()
