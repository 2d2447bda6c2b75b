"""Peers come and go by the thousand; whoever sends to them stays as it is."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from core.clock import ManualClock
from core.messages import Cancel, Message
from core.wire import MAX_MESSAGE_BYTES
from mail.door import Door
from mail.keys import ClusterKeys
from mail.mailbox import Mailbox
from mail.peers import Peers

HELLO = Cancel(attempt="a")
KEYS = ClusterKeys.generate()


@pytest.fixture
def door() -> Iterator[Door]:
    with Door(ClusterKeys.generate()) as door:
        yield door


@pytest.fixture
def nowhere() -> Iterator[str]:
    """The start of endpoints where nobody listens: a port that is bound and not listened on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"tcp://127.0.0.1:{taken.getsockname()[1]}"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def settle(most: int, within_s: float = 20.0) -> None:
    """Wait until no more than `most` descriptors are open: ZeroMQ closes sockets in the background."""
    until_s = time.monotonic() + within_s
    while descriptors() > most:
        assert time.monotonic() < until_s, f"{descriptors()} descriptors are open, not {most}"
        time.sleep(0.01)


def receive(mailbox: Mailbox, within_s: float = 20.0) -> Message | None:
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        mailbox.wait(0.02)
        if (message := mailbox.receive()) is not None:
            return message
    return None


def dead(number: int) -> str:
    """One of many addresses of this machine on which nobody listens."""
    return f"tcp://127.{1 + number // 60000}.{number // 250 % 240}.{1 + number % 250}:9"


def test_three_thousand_peers_that_come_and_go_leave_nothing_behind(door: Door) -> None:
    peers = Peers(door, most=32)
    before = descriptors()
    for number in range(3000):
        if number % 10:
            assert peers.send(dead(number), HELLO)
        else:
            mailbox = Mailbox(door)
            assert peers.send(mailbox.endpoint, HELLO)
            assert receive(mailbox) == HELLO
            mailbox.close()
        assert peers.open <= 32
        if number % 500 == 499:
            settle(before + 32 * 3)
    assert peers.lost == 0
    peers.close(linger_s=0)
    settle(before)


def test_more_peers_than_zeromq_has_sockets_by_default_are_no_error(door: Door) -> None:
    peers = Peers(door)
    assert all(peers.send(dead(number), HELLO) for number in range(1500))
    peers.close(linger_s=0)


def test_a_peer_is_forgotten_once_nothing_was_sent_for_a_while_and_known_again_when_needed(door: Door) -> None:
    clock, mailbox, other = ManualClock(), Mailbox(door), Mailbox(door)
    peers = Peers(door, clock, idle_s=60.0)
    peers.send(mailbox.endpoint, HELLO)
    assert receive(mailbox) == HELLO
    clock.advance(59.0)
    peers.send(other.endpoint, HELLO)
    assert peers.open == 2
    clock.advance(1.0)
    peers.send(other.endpoint, HELLO)
    assert peers.open == 1
    peers.send(mailbox.endpoint, HELLO)
    assert receive(mailbox) == HELLO
    assert peers.open == 2
    peers.close(linger_s=0)
    mailbox.close()
    other.close()


def test_the_least_recently_used_makes_room(door: Door) -> None:
    peers, kept = Peers(door, most=2), Mailbox(door)
    peers.send(kept.endpoint, Cancel(attempt="0"))
    for number in range(1, 50):
        peers.send(dead(number), HELLO)
        peers.send(kept.endpoint, Cancel(attempt=str(number)))
    assert [receive(kept) for _ in range(50)] == [Cancel(attempt=str(number)) for number in range(50)]
    peers.close(linger_s=0)
    kept.close()


def test_a_peer_whose_queue_stays_full_counts_as_unused(door: Door, nowhere: str) -> None:
    clock = ManualClock()
    peers = Peers(door, clock, idle_s=60.0)
    while peers.send(nowhere, HELLO):
        pass
    assert peers.lost == 1
    clock.advance(60.0)
    assert peers.send(nowhere, HELLO)
    peers.close(linger_s=0)


def test_a_message_too_large_for_any_mailbox_is_refused_here_not_by_cutting_the_connection(door: Door) -> None:
    peers, mailbox = Peers(door), Mailbox(door)
    assert not peers.send(mailbox.endpoint, Cancel(attempt="x" * MAX_MESSAGE_BYTES))
    assert peers.send(mailbox.endpoint, HELLO)
    assert receive(mailbox) == HELLO
    assert peers.lost == 1
    peers.close(linger_s=0)
    mailbox.close()


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(max_size=40), st.text(max_size=40).map(lambda text: f"tcp://{text}"), st.just("inproc://zeromq.zap.01")))
def test_no_endpoint_that_a_peer_may_name_raises(endpoint: str) -> None:
    context = zmq.Context()
    door = Door.__new__(Door)
    door.keys, door.context = KEYS, context
    peers = Peers(door)
    assert peers.send(endpoint, HELLO) in (True, False)
    assert endpoint.startswith("tcp://") or peers.lost == 1
    peers.close(linger_s=0)
    context.destroy(linger=0)


def test_a_process_without_descriptors_left_loses_the_message_and_nothing_else(door: Door) -> None:
    peers, mailbox = Peers(door), Mailbox(door)
    assert peers.send(mailbox.endpoint, HELLO)
    assert receive(mailbox) == HELLO
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors(), hard))
    try:
        refused = [peers.send(dead(number), HELLO) for number in range(20)]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not all(refused)
    assert peers.send(mailbox.endpoint, HELLO)
    assert receive(mailbox) == HELLO
    peers.close(linger_s=0)
    mailbox.close()


@pytest.mark.parametrize("end", ["socket", "context"])
def test_a_socket_that_is_none_any_more_is_a_loss_not_an_error(end: str) -> None:
    door = Door(ClusterKeys.generate())
    peers, mailbox = Peers(door), Mailbox(door)
    assert peers.send(mailbox.endpoint, HELLO)
    if end == "socket":
        peers._links[mailbox.endpoint].socket.close(linger=0)
        assert not peers.send(mailbox.endpoint, HELLO)
        assert peers.send(mailbox.endpoint, HELLO)
    else:
        door.close()
        assert not peers.send(mailbox.endpoint, HELLO)
    peers.close(linger_s=0)
    mailbox.close()
    door.close()
