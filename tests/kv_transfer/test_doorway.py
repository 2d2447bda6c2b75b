"""Who may come in: strangers make room for one another, never for themselves against members."""

from __future__ import annotations

import pytest

from core.clock import ManualClock
from core.errors import TransferAborted
from kv_transfer.doorway import HANDSHAKE_TIMEOUT_S, Doorway
from tests.kv_transfer.rig import ScriptedConnection


def guests(count: int) -> list[ScriptedConnection]:
    return [ScriptedConnection(b"") for _ in range(count)]


def closed(connections: list[ScriptedConnection]) -> list[bool]:
    return [connection.closed for connection in connections]


def test_the_stranger_who_waited_longest_makes_room() -> None:
    doorway, strangers = Doorway(ManualClock(), most_strangers=2), guests(5)
    for stranger in strangers:
        doorway.enter(stranger)
    assert closed(strangers) == [True, True, True, False, False]
    with pytest.raises(TransferAborted):
        doorway.prove(strangers[0])
    doorway.prove(strangers[3])


def test_members_take_no_room_from_strangers_nor_strangers_from_members() -> None:
    doorway, members, strangers = Doorway(ManualClock(), most_strangers=2, most_members=3), guests(3), guests(9)
    for member in members:
        doorway.enter(member)
        doorway.prove(member)
        for stranger in strangers[:3]:
            doorway.enter(stranger)
    assert closed(members) == [False] * 3
    late = guests(1)[0]
    doorway.enter(late)
    with pytest.raises(TransferAborted, match="3 senders"):
        doorway.prove(late)
    doorway.leave(members[0])
    doorway.enter(late)
    doorway.prove(late)


def test_a_handshake_has_its_time() -> None:
    clock = ManualClock()
    doorway, (early, late, member) = Doorway(clock), guests(3)
    for connection in (early, member):
        doorway.enter(connection)
    doorway.prove(member)
    clock.advance(2.0)
    doorway.enter(late)
    assert doorway.expire() == HANDSHAKE_TIMEOUT_S - 2.0
    clock.advance(HANDSHAKE_TIMEOUT_S - 2.0)
    assert doorway.expire() == 2.0
    assert closed([early, late, member]) == [True, False, False]
    clock.advance(2.0)
    assert doorway.expire() is None
    assert closed([early, late, member]) == [True, True, False]


def test_shutting_turns_everybody_out() -> None:
    doorway, (stranger, member) = Doorway(ManualClock()), guests(2)
    doorway.enter(member)
    doorway.prove(member)
    doorway.enter(stranger)
    doorway.shut()
    assert closed([stranger, member]) == [True, True]
    with pytest.raises(TransferAborted):
        doorway.prove(stranger)
