"""The decode role, one message at a time: room, grants, commits that do not add up, what is taken back."""

from __future__ import annotations

import msgspec
import pytest

from core.attempts import Phase
from core.clock import ManualClock
from core.errors import ContextLengthExceeded, CorruptTransfer, InvalidRequest, LeaseExpired, Overloaded, TransferAborted
from core.layout import KVLayout
from core.messages import AttemptState, Failed, Grant, Handoff, TokenItem, Tokens, Withdrawn
from decode.worker import COUNTER_BITS, DecodeWorker
from engine.admission import AdmissionKind
from kv_transfer.events import Broken, Received
from mail.attempt_book import AttemptBook
from mail.outbox import Outbox
from tests.support.workers import (
    BLOCK_SIZE,
    DECODE,
    GATEWAY,
    LAYOUT,
    LEASE_S,
    PREFILL,
    SLIDING,
    FakePeers,
    FakeReceiver,
    engine,
    submission,
)


class Rig:
    """A worker on a simulated engine, with everything around it faked, and a loop's work done by hand."""

    def __init__(
        self,
        num_blocks: int = 64,
        max_waiting_tokens: int = 1000,
        incarnation: int = 1,
        layout: KVLayout = LAYOUT,
        prefix_cache: bool = False,
    ) -> None:
        self.clock = ManualClock()
        self.address = msgspec.structs.replace(DECODE, incarnation=incarnation)
        self.engine = engine(self.clock, num_blocks, layout, prefix_cache=prefix_cache)
        self.peers = FakePeers()
        self.receiver = FakeReceiver(layout)
        self.book = AttemptBook(self.address, Outbox(self.address, self.peers, self.clock), self.peers, self.clock, LEASE_S)
        self.worker = DecodeWorker(
            self.engine, self.receiver, self.book, self.peers, self.address, self.clock, LEASE_S, max_waiting_tokens
        )
        self.renewals = 0

    def submit(self, attempt: str = "a", stage: str = "decode", **fields: int) -> None:
        self.worker.submit(submission(attempt, stage, **fields))

    def hear(self, phase: Phase, attempt: str = "a") -> None:
        """The prefill side's renewal."""
        self.renewals += 1
        self.book.renewed(PREFILL, self.renewals, AttemptState(attempt, phase))
        self.admit()

    def admit(self) -> None:
        for admission in self.engine.admissions():
            assert admission.kind is AdmissionKind.GRANTED
            self.worker.granted(admission.sequence.sequence_id)

    def granted(self, attempt: str = "a", **fields: int) -> Grant:
        """A grant for a new attempt."""
        self.submit(attempt, **fields)
        self.hear(Phase.ADMITTED, attempt)
        (grant,) = self.grants()
        return grant

    def run(self) -> list[TokenItem]:
        """Step until nothing is left to do; what the gateway got."""
        while self.engine.has_work:
            output = self.engine.step()
            for token in output.tokens:
                self.worker.drawn(token)
            self.book.flush()
        return [item for message in self.peers.take(GATEWAY) if isinstance(message, Tokens) for item in message.items]

    def grants(self) -> list[Grant]:
        return [message for message in self.peers.take(PREFILL) if isinstance(message, Grant)]

    def commit(self, grant: Grant, tokens: int = 10, tail: bytes | None = None) -> None:
        self.receiver.grants.pop(grant.grant)
        tail = msgspec.msgpack.encode(Handoff(token=7, position=0, tokens=tokens)) if tail is None else tail
        self.worker.received(Received(grant=grant.grant, attempt=grant.attempt, tail=tail, kv_bytes=123, transfer_s=0.5))

    def failure(self) -> str:
        (failed,) = self.peers.take(GATEWAY)
        assert isinstance(failed, Failed)
        return failed.code

    def idle(self) -> bool:
        counted = (self.worker.waiting, self.worker.waiting_tokens)
        return self.engine.invariants() == [] and len(self.book) == 0 and not self.receiver.grants and counted == (0, 0)


def test_room_is_asked_for_once_the_prefill_side_has_admitted_the_prompt() -> None:
    rig = Rig()
    rig.submit()
    rig.hear(Phase.WAITING)
    assert rig.grants() == []
    assert rig.engine.load().free_blocks == 64
    rig.hear(Phase.ADMITTED)
    (grant,) = rig.grants()
    assert grant.answers == rig.renewals
    assert (grant.endpoints, grant.windowed) == ((rig.receiver.endpoint,), False)
    assert rig.receiver.grants == {grant.grant: "a"}


def test_a_committed_attempt_goes_on_from_the_second_token() -> None:
    rig = Rig()
    rig.commit(rig.granted())
    items = rig.run()
    assert [item.position for item in items] == [1, 2, 3, 4]
    served = items[0].served
    assert served is not None
    assert (served.kv_bytes, served.transfer_s) == (123, 0.5)
    assert all(item.served is None for item in items[1:])
    assert rig.idle()


def test_of_layers_with_windows_the_grant_wants_what_they_see() -> None:
    """It has no blocks for what came before. Of the next prompt's window the first block is not there: its first token
    never came, since the window began behind it."""
    rig = Rig(num_blocks=20, layout=SLIDING, prefix_cache=True)
    grant = rig.granted(tokens=30, max_tokens=3)
    assert (grant.windowed, grant.first_token) == (True, 0)
    assert rig.engine.load().free_blocks == 20 - 8 - 3  # the window of six tokens lies in three blocks at most
    rig.commit(grant, tokens=30)
    assert len(rig.run()) == 2
    again = rig.granted("b", tokens=32, max_tokens=3)
    assert (again.windowed, again.first_token) == (True, 24)
    rig.commit(again, tokens=32)
    assert len(rig.run()) == 2
    assert rig.idle()


def test_nothing_runs_before_the_commit() -> None:
    rig = Rig()
    rig.granted()
    assert not rig.engine.launch()


def test_a_grant_that_could_not_be_sent_is_sent_when_the_prefill_side_still_has_none() -> None:
    rig = Rig()
    rig.submit()
    rig.peers.full.add(PREFILL.mailbox)
    rig.hear(Phase.ADMITTED)
    rig.peers.full.clear()
    assert rig.grants() == []
    rig.hear(Phase.ADMITTED)
    rig.hear(Phase.ADMITTED)
    first, second = rig.grants()
    assert first.grant == second.grant
    assert (first.answers, second.answers) == (2, 3)
    assert list(rig.receiver.grants) == [first.grant]


def test_a_grant_that_is_never_taken_does_not_live_by_being_sent_again() -> None:
    rig = Rig()
    grant = rig.granted()
    rig.hear(Phase.ADMITTED)
    assert rig.receiver.renewed == []
    rig.hear(Phase.GRANTED)
    assert rig.receiver.renewed == [grant.grant]


def test_grants_wait_for_room_in_order_of_arrival() -> None:
    rig = Rig(num_blocks=8)
    for attempt, tokens in (("a", 6 * BLOCK_SIZE), ("big", 6 * BLOCK_SIZE), ("small", 1)):
        rig.submit(attempt, tokens=tokens, max_tokens=2)
        rig.hear(Phase.ADMITTED, attempt)
    assert [grant.attempt for grant in rig.grants()] == ["a"]
    rig.book.cancel("a")
    rig.admit()
    assert [grant.attempt for grant in rig.grants()] == ["big", "small"]


@pytest.mark.parametrize("granted", [True, False])
def test_a_prompt_that_lost_its_blocks_gives_room_or_its_place_back_and_asks_anew(granted: bool) -> None:
    rig = Rig(num_blocks=8)
    if not granted:
        rig.granted("blocker", tokens=6 * BLOCK_SIZE, max_tokens=2)
    rig.submit(tokens=6 * BLOCK_SIZE, max_tokens=2)
    rig.hear(Phase.ADMITTED)
    before = rig.grants()
    assert len(before) == granted
    rig.hear(Phase.WAITING)
    assert (rig.worker.waiting, rig.worker.waiting_tokens) == (1, 6 * BLOCK_SIZE)
    assert "a" not in rig.receiver.grants.values()
    if not granted:
        rig.book.cancel("blocker")
    assert rig.engine.load().free_blocks == 8
    rig.hear(Phase.ADMITTED)
    (after,) = rig.grants()
    assert after.grant not in [grant.grant for grant in before]
    rig.commit(after, tokens=6 * BLOCK_SIZE)
    assert len(rig.run()) == 1
    assert rig.idle()


def test_what_arrives_for_a_grant_that_was_taken_back_never_runs() -> None:
    rig = Rig()
    grant = rig.granted()
    rig.hear(Phase.WAITING)
    rig.receiver.grants[grant.grant] = "a"
    rig.commit(grant)
    assert not rig.engine.has_work
    rig.worker.broken(Broken(grant=grant.grant, attempt="a", error=CorruptTransfer("stale")))
    assert len(rig.book) == 1


def test_numbers_of_grants_differ_between_incarnations() -> None:
    numbers = [Rig(incarnation=incarnation).granted().grant for incarnation in (1, 2, (1 << 24) - 1)]
    assert len({number >> COUNTER_BITS for number in numbers}) == 3
    assert all(0 < number < 1 << 64 for number in numbers)


def test_tokens_that_wait_for_their_prefill_side_are_bounded() -> None:
    rig = Rig(max_waiting_tokens=30)
    for attempt in ("a", "b"):
        rig.submit(attempt, tokens=24, max_tokens=2)
    assert rig.failure() == Overloaded.code
    assert (rig.worker.waiting, rig.worker.waiting_tokens) == (1, 24)
    rig.hear(Phase.ADMITTED)
    assert (rig.worker.waiting, rig.worker.waiting_tokens) == (0, 0)
    rig.submit("c", tokens=24, max_tokens=2)
    rig.book.cancel("c")
    rig.book.cancel("a")
    assert rig.idle()


def test_one_attempt_may_wait_however_large() -> None:
    rig = Rig(max_waiting_tokens=5)
    rig.submit()
    assert rig.worker.waiting == 1


def test_what_can_never_fit_is_refused_and_both_are_told() -> None:
    rig = Rig(num_blocks=8)
    rig.submit(tokens=20, max_tokens=100)
    rig.hear(Phase.ADMITTED)
    assert rig.failure() == ContextLengthExceeded.code
    assert [type(message) for message in rig.peers.take(PREFILL)] == [Withdrawn]
    assert rig.idle()


@pytest.mark.parametrize("stage", ["decode", "local"])
def test_nonsense_is_refused(stage: str) -> None:
    rig = Rig()
    rig.worker.submit(msgspec.structs.replace(submission("a", stage), tokens=b"", peer=None))
    assert rig.failure() == InvalidRequest.code
    assert rig.idle()


@pytest.mark.parametrize(
    "tail",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode({"token": "x"}),
        msgspec.msgpack.encode(Handoff(token=7, position=1, tokens=10)),
        msgspec.msgpack.encode(Handoff(token=7, position=0, tokens=9)),
        msgspec.msgpack.encode(Handoff(token=100, position=0, tokens=10)),
    ],
)
def test_a_hand_off_about_something_else_never_runs(tail: bytes) -> None:
    rig = Rig()
    rig.commit(rig.granted(), tail=tail)
    assert rig.failure() == CorruptTransfer.code
    assert rig.idle()


def test_a_commit_of_another_grant_is_fenced() -> None:
    rig = Rig()
    grant = rig.granted()
    other = msgspec.structs.replace(grant, grant=grant.grant + 1)
    rig.receiver.grants[other.grant] = "a"
    rig.commit(other)
    assert not rig.engine.launch()
    rig.worker.broken(Broken(grant=98, attempt="a", error=CorruptTransfer("stale")))
    assert len(rig.book) == 1
    assert grant.grant in rig.receiver.grants


def test_a_broken_transfer_is_reported_to_both_sides_and_freed() -> None:
    rig = Rig()
    grant = rig.granted()
    rig.receiver.grants.pop(grant.grant)
    rig.worker.broken(Broken(grant=grant.grant, attempt="a", error=LeaseExpired("silent")))
    assert rig.failure() == LeaseExpired.code
    assert [type(message) for message in rig.peers.take(PREFILL)] == [Withdrawn]
    assert rig.idle()


def test_what_its_sender_gave_up_is_freed_and_left_to_the_prefill_side_to_explain() -> None:
    rig = Rig()
    grant = rig.granted()
    rig.receiver.grants.pop(grant.grant)
    rig.worker.broken(Broken(grant=grant.grant, attempt="a", error=TransferAborted("finished"), given_up=True))
    assert rig.peers.take(GATEWAY) == rig.peers.take(PREFILL) == []
    assert rig.idle()


def test_a_fault_after_the_commit_ends_the_attempt_and_nothing_else() -> None:
    rig = Rig()
    rig.commit(rig.granted())
    rig.worker.broken(Broken(grant=rig.worker._last_grant, attempt="a", error=CorruptTransfer("too late")))
    assert len(rig.run()) == 4
    assert rig.idle()


def test_a_withdrawal_frees_a_grant_but_not_a_running_sequence() -> None:
    rig = Rig()
    rig.commit(rig.granted("a"))
    rig.granted("b")
    for attempt in ("a", "b"):
        rig.book.withdrawn(Withdrawn(worker=PREFILL, attempt=attempt, reason="gone"))
    assert len(rig.book) == 1
    assert len(rig.run()) == 4
    assert rig.idle()


@pytest.mark.parametrize("phase", ["waiting", "admitted", "granted", "running"])
def test_cancel_frees_everything_in_every_phase(phase: str) -> None:
    rig = Rig(num_blocks=8)
    if phase == "admitted":
        rig.granted("blocker", tokens=6 * BLOCK_SIZE, max_tokens=2)
    rig.submit(tokens=6 * BLOCK_SIZE, max_tokens=8)
    if phase != "waiting":
        rig.hear(Phase.ADMITTED)
    if phase == "running":
        rig.commit(rig.grants()[0], tokens=6 * BLOCK_SIZE)
        rig.engine.step()
    rig.peers.sent.clear()
    rig.book.cancel("a")
    rig.book.cancel("blocker")
    assert rig.peers.sent == []
    assert rig.idle()


def test_a_local_attempt_is_read_and_written_here() -> None:
    rig = Rig()
    rig.submit(stage="local")
    items = rig.run()
    assert [item.position for item in items] == [0, 1, 2, 3, 4]
    assert items[0].served is not None
    assert rig.idle()
