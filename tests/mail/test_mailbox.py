"""Mailboxes deliver among members, and to nobody else."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from core.messages import Cancel, Message
from mail.door import Door
from mail.keys import ClusterKeys
from mail.mailbox import Mailbox
from mail.peers import Peers


@pytest.fixture
def keys() -> ClusterKeys:
    return ClusterKeys.generate()


@pytest.fixture
def door(keys: ClusterKeys) -> Iterator[Door]:
    with Door(keys) as door:
        yield door


def receive(mailbox: Mailbox, within_s: float) -> Message | None:
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        mailbox.wait(0.02)
        if (message := mailbox.receive()) is not None:
            return message
    return None


def test_messages_arrive_in_order(door: Door) -> None:
    mailbox, peers = Mailbox(door), Peers(door)
    for number in range(100):
        assert peers.send(mailbox.endpoint, Cancel(attempt=str(number)))
    assert [receive(mailbox, 5.0) for _ in range(100)] == [Cancel(attempt=str(number)) for number in range(100)]
    peers.close()
    mailbox.close()


@pytest.mark.parametrize(("host", "shown"), [("127.0.0.1", "127.0.0.1"), ("::1", "[::1]")])
def test_its_endpoint_is_where_it_is_reached(door: Door, host: str, shown: str) -> None:
    if ":" in host and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    mailbox, peers = Mailbox(door, host), Peers(door)
    assert mailbox.endpoint.startswith(f"tcp://{shown}:")
    assert peers.send(mailbox.endpoint, Cancel(attempt="a"))
    assert receive(mailbox, 5.0) == Cancel(attempt="a")
    peers.close()
    mailbox.close()


def test_a_stranger_is_not_heard(door: Door) -> None:
    mailbox, member = Mailbox(door), Peers(door)
    with Door(ClusterKeys.generate()) as elsewhere:
        stranger = Peers(elsewhere)
        stranger.send(mailbox.endpoint, Cancel(attempt="stranger"))
        member.send(mailbox.endpoint, Cancel(attempt="member"))
        assert receive(mailbox, 5.0) == Cancel(attempt="member")
        assert receive(mailbox, 0.3) is None
        stranger.close(linger_s=0)
    member.close()
    mailbox.close()


def test_knowing_the_public_key_is_not_enough(door: Door, keys: ClusterKeys) -> None:
    mailbox = Mailbox(door)
    public, secret = zmq.curve_keypair()
    context = zmq.Context()
    socket = context.socket(zmq.PUSH)
    socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = keys.public.encode(), public, secret
    socket.connect(mailbox.endpoint)
    socket.send(b"hello")
    assert receive(mailbox, 0.3) is None
    assert mailbox.rejected == 0
    context.destroy(linger=0)
    mailbox.close()


def test_malformed_messages_are_counted_and_skipped(door: Door, keys: ClusterKeys) -> None:
    mailbox, peers = Mailbox(door), Peers(door)
    assert peers.send(mailbox.endpoint, Cancel(attempt="before"))
    assert receive(mailbox, 5.0) is not None
    socket = peers._links[mailbox.endpoint].socket
    socket.send(b"\xc1 not msgpack")
    peers.send(mailbox.endpoint, Cancel(attempt="after"))
    assert receive(mailbox, 5.0) == Cancel(attempt="after")
    assert mailbox.rejected == 1
    peers.close()
    mailbox.close()


def test_sending_to_a_peer_that_does_not_read_never_blocks(door: Door) -> None:
    peers = Peers(door)
    answers = [peers.send("tcp://127.0.0.1:1", Cancel(attempt="x")) for _ in range(10_100)]
    assert not all(answers)
    assert not peers.send("not an endpoint", Cancel(attempt="x"))
    peers.close(linger_s=0)


def test_wake_ends_a_wait_from_another_thread(door: Door) -> None:
    mailbox = Mailbox(door)
    waiter = threading.Thread(target=mailbox.wait, args=(30.0,))
    waiter.start()
    mailbox.wake()
    waiter.join(timeout=10.0)
    assert not waiter.is_alive()
    mailbox.close()
