"""The decode role, one message at a time: room, grants, commits that do not add up, leases."""

from __future__ import annotations

from typing import cast

import msgspec
import pytest

from core.clock import ManualClock
from core.errors import CorruptTransfer, DeadlineExceeded, LeaseExpired, Overloaded
from core.messages import Failed, Grant, Handoff, Renew, Revoke, TokenItem, Tokens
from decode.worker import DecodeWorker
from kv_transfer.events import Broken, Received
from kv_transfer.receiver import KVReceiver
from mail.outbox import Outbox
from mail.peers import Peers
from tests.support.workers import BLOCK_SIZE, DECODE, GATEWAY, LEASE_S, PREFILL, FakePeers, FakeReceiver, engine, submission


class Rig:
    """A worker on a simulated engine, with everything around it faked."""

    def __init__(self, num_blocks: int = 64, max_waiting_tokens: int = 1000) -> None:
        self.clock = ManualClock()
        self.engine = engine(self.clock, num_blocks, prefix_cache=False)
        self.peers = FakePeers()
        self.receiver = FakeReceiver()
        peers = cast(Peers, self.peers)
        self.outbox = Outbox(DECODE, peers, self.clock)
        self.worker = DecodeWorker(
            self.engine,
            cast(KVReceiver, self.receiver),
            self.outbox,
            peers,
            DECODE,
            self.clock,
            LEASE_S,
            max_waiting_tokens,
        )

    def run(self) -> list[TokenItem]:
        """Step until nothing is left to do; what the gateway got."""
        while self.engine.has_work:
            output = self.engine.step()
            for token in output.tokens:
                self.worker.drawn(token)
            self.outbox.flush()
        return [item for message in self.peers.take(GATEWAY) if isinstance(message, Tokens) for item in message.items]

    def grants(self) -> list[Grant]:
        return [message for message in self.peers.take(PREFILL) if isinstance(message, Grant)]

    def commit(self, attempt: str, grant: int, tokens: int = 10, tail: bytes | None = None) -> None:
        self.receiver.open_grants.pop(grant)
        tail = msgspec.msgpack.encode(Handoff(token=7, position=0, tokens=tokens)) if tail is None else tail
        self.worker.received(Received(grant=grant, attempt=attempt, tail=tail, kv_bytes=123, transfer_s=0.5))

    def failure(self) -> Failed:
        (failed,) = self.peers.take(GATEWAY)
        assert isinstance(failed, Failed)
        return failed

    def idle(self) -> bool:
        return self.engine.invariants() == [] and self.worker.attempts == 0 and not self.receiver.open_grants


def test_a_committed_attempt_goes_on_from_the_second_token() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "decode"))
    (grant,) = rig.grants()
    rig.commit("a", grant.grant)
    items = rig.run()
    assert [item.position for item in items] == [1, 2, 3, 4]
    served = items[0].served
    assert served is not None
    assert (served.kv_bytes, served.transfer_s) == (123, 0.5)
    assert all(item.served is None for item in items[1:])
    assert rig.idle()


def test_nothing_runs_before_the_commit() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "decode"))
    assert not rig.engine.has_work


def test_grants_wait_for_room_in_order_of_arrival() -> None:
    rig = Rig(num_blocks=8)
    for attempt, tokens in (("a", 6 * BLOCK_SIZE), ("big", 7 * BLOCK_SIZE), ("small", 1)):
        rig.worker.submit(submission(attempt, "decode", tokens=tokens, max_tokens=2))
    (first,) = rig.grants()
    assert first.attempt == "a"
    assert (rig.worker.queued, rig.worker.queued_tokens) == (2, 7 * BLOCK_SIZE + 1)
    rig.worker.cancel("a")
    rig.worker.grant_waiting()
    assert rig.grants()[0].attempt == "big"


def test_tokens_that_wait_for_room_are_bounded() -> None:
    rig = Rig(num_blocks=8, max_waiting_tokens=30)
    for attempt in ("a", "b", "c"):
        rig.worker.submit(submission(attempt, "decode", tokens=24, max_tokens=2))
    assert rig.failure().code == Overloaded.code


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode(Handoff(token=7, position=1, tokens=10)),
        msgspec.msgpack.encode(Handoff(token=7, position=0, tokens=9)),
    ],
)
def test_a_hand_off_about_something_else_never_runs(tail: bytes) -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "decode"))
    (grant,) = rig.grants()
    rig.commit("a", grant.grant, tail=tail)
    assert rig.failure().code == CorruptTransfer.code
    assert rig.idle()


def test_a_token_outside_the_vocabulary_never_runs() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "decode"))
    (grant,) = rig.grants()
    rig.commit("a", grant.grant, tail=msgspec.msgpack.encode(Handoff(token=100, position=0, tokens=10)))
    assert rig.failure().code == CorruptTransfer.code
    assert rig.idle()


def test_a_commit_of_another_grant_is_fenced() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "decode"))
    (grant,) = rig.grants()
    rig.receiver.open_grants[99] = "a"
    rig.commit("a", 99)
    assert not rig.engine.has_work
    rig.worker.broken(Broken(grant=98, attempt="a", error=CorruptTransfer("stale")))
    assert rig.worker.attempts == 1
    assert grant.grant in rig.receiver.open_grants


def test_a_broken_transfer_is_reported_to_both_sides_and_freed() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "decode"))
    (grant,) = rig.grants()
    rig.receiver.open_grants.pop(grant.grant)
    rig.worker.broken(Broken(grant=grant.grant, attempt="a", error=CorruptTransfer("digest")))
    assert rig.failure().code == CorruptTransfer.code
    assert [type(message) for message in rig.peers.take(PREFILL)] == [Revoke]
    assert rig.idle()


def test_a_silent_prefill_side_ends_a_queued_attempt_after_a_lease() -> None:
    rig = Rig(num_blocks=8)
    rig.worker.submit(submission("blocker", "decode", tokens=24, max_tokens=2))
    rig.worker.submit(submission("a", "decode", tokens=24, max_tokens=2))
    rig.clock.advance(LEASE_S * 0.9)
    rig.worker.renewed(Renew(worker=PREFILL, attempts=("a",)))
    rig.clock.advance(LEASE_S * 0.9)
    rig.worker.tick()
    assert rig.worker.queued == 1
    rig.clock.advance(LEASE_S * 0.2)
    rig.worker.tick()
    assert rig.failure().code == LeaseExpired.code
    rig.worker.cancel("blocker")
    assert rig.idle()


def test_while_kv_is_in_transit_the_receiver_keeps_the_lease() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "decode"))
    (grant,) = rig.grants()
    rig.worker.renewed(Renew(worker=PREFILL, attempts=("a",)))
    assert rig.receiver.renewed == [grant.grant]
    rig.clock.advance(LEASE_S * 10)
    rig.worker.tick()
    assert rig.worker.attempts == 1
    rig.worker.broken(Broken(grant=grant.grant, attempt="a", error=LeaseExpired("silent")))
    assert rig.failure().code == LeaseExpired.code


def test_a_prefill_side_is_told_what_waits_or_is_in_transit_here() -> None:
    rig = Rig(num_blocks=8)
    rig.worker.submit(submission("granted", "decode", tokens=24, max_tokens=2))
    rig.worker.submit(submission("queued", "decode", tokens=24, max_tokens=2))
    rig.peers.take(PREFILL)
    rig.clock.advance(LEASE_S / 2)
    rig.worker.renew()
    rig.worker.renew()
    assert rig.peers.take(PREFILL) == [Renew(worker=DECODE, attempts=("granted", "queued"))]


def test_a_running_attempt_needs_no_lease_but_keeps_its_deadline() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "local", deadline_s=50.0))
    rig.clock.advance(LEASE_S * 2)
    rig.worker.tick()
    assert rig.worker.attempts == 1
    rig.clock.advance(50.0)
    rig.worker.tick()
    assert rig.failure().code == DeadlineExceeded.code
    assert rig.idle()


def test_abandon_frees_a_grant_but_not_a_running_sequence() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "decode"))
    rig.worker.submit(submission("b", "decode"))
    first, _ = rig.grants()
    rig.commit("a", first.grant)
    rig.worker.abandoned("a")
    rig.worker.abandoned("b")
    assert rig.worker.attempts == 1
    assert len(rig.run()) == 4
    assert rig.idle()


def test_a_local_attempt_is_read_and_written_here() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "local"))
    items = rig.run()
    assert [item.position for item in items] == [0, 1, 2, 3, 4]
    assert items[0].served is not None
    assert rig.idle()
