"""The prefill role, one message at a time: grants early, late and never; who is told what; what is freed."""

from __future__ import annotations

from typing import cast

import msgspec
import pytest

from core.clock import ManualClock
from core.errors import LeaseExpired, TransferAborted
from core.messages import Abandon, Failed, Grant, Handoff, Renew, Tokens
from engine.decision import Part
from engine.engine import Engine
from kv_transfer.events import Delivered, SendFailed
from kv_transfer.sender import KVSender
from mail.outbox import Outbox
from mail.peers import Peers
from prefill.worker import PrefillWorker
from tests.support.workers import DECODE, GATEWAY, LAYERS, LEASE_S, PREFILL, FakePeers, FakeSender, engine, submission


class Rig:
    """A worker on a simulated engine, with everything around it faked."""

    def __init__(self, **config: object) -> None:
        self.clock = ManualClock()
        self.engine: Engine = engine(self.clock, **config)
        self.peers = FakePeers()
        self.sender = FakeSender()
        peers = cast(Peers, self.peers)
        self.outbox = Outbox(PREFILL, peers, self.clock)
        self.worker = PrefillWorker(self.engine, cast(KVSender, self.sender), self.outbox, peers, PREFILL, self.clock, LEASE_S)

    def step(self) -> None:
        output = self.engine.step(self.worker.layer_written)
        for token in output.tokens:
            self.worker.drawn(token)
        for sequence, error in output.failed:
            self.worker.failed(sequence, error)
        self.worker.stepped()
        self.outbox.flush()

    def grant(self, attempt: str = "a", first_token: int = 0) -> None:
        number = 1 + len(self.sender.sessions)
        self.worker.granted(
            Grant(attempt=attempt, grant=number, decode=DECODE, kv_endpoint="d:1", first_token=first_token, lease_s=LEASE_S)
        )

    def idle(self) -> bool:
        return self.engine.invariants() == [] and self.worker.attempts == 0


@pytest.mark.parametrize("when", ["before the submit", "before the step", "between chunks", "after the first token"])
@pytest.mark.parametrize("first_token", [0, 4])
def test_all_kv_is_pushed_whenever_the_grant_comes(when: str, first_token: int) -> None:
    rig = Rig(max_num_batched_tokens=6)
    if when == "before the submit":
        rig.grant(first_token=first_token)
    rig.worker.submit(submission("a", "prefill", tokens=10))
    if when == "before the step":
        rig.grant(first_token=first_token)
    rig.step()
    if when == "between chunks":
        rig.grant(first_token=first_token)
    rig.step()
    if when == "after the first token":
        rig.grant(first_token=first_token)
    session = rig.sender.sessions["a"]
    assert session.pushed == {layer: set(range(first_token, 10)) for layer in range(LAYERS)}
    (tokens,) = rig.peers.take(GATEWAY)
    assert isinstance(tokens, Tokens)
    assert session.tail is not None
    handoff = msgspec.msgpack.decode(session.tail, type=Handoff)
    assert handoff == Handoff(token=tokens.items[0].tokens[0], position=0, tokens=10)
    assert not rig.idle()
    rig.worker.delivered(Delivered(attempt="a", kv_bytes=1, transfer_s=0.0))
    assert rig.idle()


def test_a_grant_in_the_middle_of_a_step_pushes_at_once_what_is_written() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "prefill", tokens=10))
    seen: list[dict[int, set[int]]] = []

    def layer_written(parts: tuple[Part, ...], layer: int) -> None:
        if layer == 1:
            rig.worker.granted(
                Grant(attempt="a", grant=1, decode=DECODE, kv_endpoint="d:1", first_token=0, lease_s=LEASE_S), stepping=True
            )
        rig.worker.layer_written(parts, layer)
        seen.append(dict(rig.sender.sessions["a"].pushed) if rig.sender.sessions else {})

    rig.engine.step(layer_written)
    assert seen == [{}, {0: set(range(10)), 1: set(range(10))}]


@pytest.mark.parametrize("held", [True, False])
def test_a_grant_in_the_middle_of_somebody_elses_step_is_not_forgotten(held: bool) -> None:
    rig = Rig(max_num_seqs=1, prefix_cache=False)
    rig.worker.submit(submission("a", "prefill", tokens=10))
    if held:
        rig.step()
    rig.worker.submit(submission("b", "prefill", tokens=8))
    running, granted = ("b", "a") if held else ("a", "b")

    def layer_written(parts: tuple[Part, ...], layer: int) -> None:
        assert [part.sequence.sequence_id for part in parts] == [running]
        if layer == 1:
            rig.worker.granted(
                Grant(attempt=granted, grant=1, decode=DECODE, kv_endpoint="d:1", first_token=0, lease_s=LEASE_S),
                stepping=True,
            )
        rig.worker.layer_written(parts, layer)

    for token in rig.engine.step(layer_written).tokens:
        rig.worker.drawn(token)
    rig.worker.stepped()
    if not held:
        rig.step()
    assert rig.sender.sessions[granted].tail is not None


def test_kv_from_the_prefix_cache_is_pushed_too() -> None:
    rig = Rig()
    for attempt in ("a", "b"):
        rig.worker.submit(submission(attempt, "prefill", tokens=10))
        rig.grant(attempt)
        rig.step()
        assert rig.sender.sessions[attempt].tail is not None
        rig.worker.delivered(Delivered(attempt=attempt, kv_bytes=1, transfer_s=0.0))
    assert rig.idle()


def test_a_first_token_that_ends_the_request_ends_the_hand_off() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "prefill", max_tokens=1))
    rig.grant()
    rig.step()
    assert rig.sender.sessions["a"].aborted is not None
    assert [type(message) for message in rig.peers.take(DECODE)] == [Abandon]
    assert rig.idle()


def test_a_failed_transfer_is_reported_to_both_sides_and_freed() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "prefill"))
    rig.grant()
    rig.step()
    rig.peers.take(GATEWAY)
    rig.worker.send_failed(SendFailed(attempt="a", error=TransferAborted("the peer is gone")))
    (failed,) = rig.peers.take(GATEWAY)
    assert isinstance(failed, Failed)
    assert failed.code == TransferAborted.code
    assert [type(message) for message in rig.peers.take(DECODE)] == [Abandon]
    assert rig.idle()


def test_a_silent_decode_side_ends_the_attempt_after_a_lease() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "prefill"))
    rig.step()
    rig.peers.take(GATEWAY)
    rig.clock.advance(LEASE_S * 0.9)
    rig.worker.renewed(Renew(worker=DECODE, attempts=("a",)))
    rig.clock.advance(LEASE_S * 0.9)
    rig.worker.tick()
    assert rig.worker.attempts == 1
    rig.clock.advance(LEASE_S * 0.2)
    rig.worker.tick()
    (failed,) = rig.peers.take(GATEWAY)
    assert isinstance(failed, Failed)
    assert failed.code == LeaseExpired.code
    assert rig.idle()


def test_the_decode_side_is_told_which_attempts_live_here() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "prefill"))
    rig.worker.submit(submission("b", "prefill"))
    rig.clock.advance(LEASE_S / 2)
    rig.worker.tick()
    assert rig.peers.take(DECODE) == [Renew(worker=PREFILL, attempts=("a", "b"))]


def test_a_refused_submission_tells_gateway_and_decode_side() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "prefill", tokens=199))
    assert [type(message) for message in rig.peers.take(GATEWAY)] == [Failed]
    assert [type(message) for message in rig.peers.take(DECODE)] == [Abandon]
    assert rig.idle()


def test_grants_that_nobody_asked_for_expire() -> None:
    rig = Rig()
    rig.grant("stray")
    rig.clock.advance(LEASE_S * 1.1)
    rig.worker.tick()
    rig.worker.submit(submission("stray", "prefill"))
    rig.step()
    assert rig.sender.sessions == {}


def test_cancel_says_nothing_and_frees() -> None:
    rig = Rig()
    rig.worker.submit(submission("a", "prefill"))
    rig.grant()
    rig.step()
    rig.peers.sent.clear()
    rig.worker.cancel("a")
    assert rig.sender.sessions["a"].aborted == "cancelled"
    assert rig.peers.sent == []
    assert rig.idle()
