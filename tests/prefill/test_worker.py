"""The prefill role, one message at a time: grants early, late, again and never; blocks that are taken back; who is told what."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest

from core.attempts import Phase
from core.clock import ManualClock
from core.errors import TransferAborted, TransferError
from core.layout import KVLayout
from core.messages import AttemptState, Failed, Grant, Handoff, Message, Renew, Tokens, Withdrawn
from engine.admission import AdmissionKind
from engine.engine import Engine
from kv_transfer.events import Delivered, SendFailed
from mail.attempt_book import AttemptBook
from mail.outbox import Outbox
from prefill.worker import PrefillWorker
from tests.support.workers import (
    BLOCK_SIZE,
    DECODE,
    GATEWAY,
    LAYERS,
    LAYOUT,
    LEASE_S,
    PREFILL,
    SLIDING,
    WINDOW,
    FakePeers,
    FakeSender,
    engine,
    submission,
)


class Rig:
    """A worker on a simulated engine, with everything around it faked, and a loop's work done by hand."""

    def __init__(self, num_blocks: int = 64, layout: KVLayout = LAYOUT, **config: object) -> None:
        self.clock = ManualClock()
        self.engine: Engine = engine(self.clock, num_blocks, layout, **config)
        self.peers = FakePeers()
        self.sender = FakeSender(layout)
        self.book = AttemptBook(PREFILL, Outbox(PREFILL, self.peers, self.clock), self.peers, self.clock, LEASE_S)
        self.worker = PrefillWorker(self.engine, self.sender, self.book, self.clock)
        self.launches = 0

    def submit(self, attempt: str = "a", **fields: int) -> None:
        self.worker.submit(submission(attempt, "prefill", **fields))

    def launch(self) -> bool:
        """Begin a step, and take in what it admitted."""
        layer_written = partial(self._layer_written, self.launches + 1)
        launched = self.engine.launch(layer_written)
        self.launches += launched
        self.admit()
        return launched

    def admit(self) -> None:
        for admission in self.engine.admissions():
            name = admission.sequence.sequence_id
            if admission.kind is AdmissionKind.ADMITTED:
                self.worker.admitted(name)
            elif admission.kind is AdmissionKind.TAKEN_BACK:
                self.worker.taken_back(name, self.launches)
        self.book.flush()

    def collect(self) -> None:
        self.layers: list[tuple[object, ...]] = []
        output = self.engine.collect()
        for written in self.layers:
            self.worker.layer_written(*written)
        for token in output.tokens:
            self.worker.drawn(token)
        for sequence, error in output.failed:
            self.worker.failed(sequence, error)
        self.book.flush()

    def step(self) -> None:
        self.launch()
        self.collect()

    def _layer_written(self, launch: int, parts: tuple[object, ...], layer: int) -> None:
        self.layers += [(launch, part, layer, f"fence {launch}.{layer}") for part in parts]

    def grant(self, attempt: str = "a", first_token: int = 0, number: int = 1, answers: int = 99, **fields: object) -> None:
        grant = Grant(
            attempt=attempt,
            grant=number,
            decode=DECODE,
            endpoints=("d:1",),
            first_token=first_token,
            windowed=self.engine.groups.windowed,
            lease_s=5.0,
            answers=answers,
        )
        self.worker.granted(msgspec.structs.replace(grant, **fields))

    def said(self) -> list[tuple[str, Phase]]:
        """What the decode side was told since it was last asked."""
        messages = self.peers.take(DECODE)
        return [(state.attempt, state.phase) for m in messages if isinstance(m, Renew) for state in m.states]

    def handoff(self, attempt: str = "a") -> Handoff:
        tail = self.sender.sessions[attempt].tail
        assert tail is not None
        return msgspec.msgpack.decode(tail, type=Handoff)

    def idle(self) -> bool:
        return self.engine.invariants() == [] and len(self.book) == 0


def failure(messages: list[Message]) -> str:
    (failed,) = [message for message in messages if isinstance(message, Failed)]
    return failed.code


@pytest.mark.parametrize("when", ["as it is admitted", "between chunks", "before the first token", "after the first token"])
@pytest.mark.parametrize("first_token", [0, 4, 10])
def test_all_kv_is_pushed_whenever_the_grant_comes(when: str, first_token: int) -> None:
    rig = Rig(max_num_batched_tokens=6)
    rig.submit()
    rig.launch()
    if when == "as it is admitted":
        rig.grant(first_token=first_token)
    rig.collect()
    if when == "between chunks":
        rig.grant(first_token=first_token)
    rig.launch()
    if when == "before the first token":
        rig.grant(first_token=first_token)
    rig.collect()
    if when == "after the first token":
        rig.grant(first_token=first_token)
    session = rig.sender.sessions["a"]
    wanted = set(range(first_token, 10))
    assert all(session.pushed.get(layer, set()) == wanted for layer in range(LAYERS))
    (tokens,) = rig.peers.take(GATEWAY)
    assert isinstance(tokens, Tokens)
    assert rig.handoff() == Handoff(token=tokens.items[0].tokens[0], position=0, tokens=10)
    assert not rig.idle()
    rig.worker.delivered(Delivered(attempt="a", kv_bytes=1, transfer_s=0.0))
    assert rig.idle()


def test_what_is_pushed_goes_with_the_fence_taken_behind_its_writes() -> None:
    rig = Rig(max_num_batched_tokens=6)
    rig.submit()
    rig.step()
    rig.grant()
    rig.step()
    assert rig.sender.sessions["a"].fences == ["fence 1.1", "fence 1.1", "fence 2.0", "fence 2.1"]


def test_the_decode_side_is_asked_for_room_once_the_prompt_has_blocks() -> None:
    rig = Rig(num_blocks=4, prefix_cache=False)
    rig.submit("a")
    rig.submit("b")
    rig.launch()
    assert rig.said() == [("a", Phase.ADMITTED)]


def test_a_grant_to_a_prompt_without_blocks_opens_nothing() -> None:
    rig = Rig()
    rig.submit()
    rig.grant()
    assert rig.sender.sessions == {}
    rig.step()
    assert rig.said() == [("a", Phase.ADMITTED)]
    rig.grant()
    assert rig.handoff().tokens == 10


def test_a_grant_that_comes_again_changes_nothing() -> None:
    rig = Rig()
    rig.submit()
    rig.step()
    for number in (1, 1, 2):
        rig.grant(number=number)
    assert rig.sender.sessions["a"].grant == 1
    assert rig.sender.failed == []
    assert rig.handoff().tokens == 10


@pytest.mark.parametrize(
    "decode",
    [
        PREFILL,
        msgspec.structs.replace(DECODE, incarnation=2),
        msgspec.structs.replace(DECODE, mailbox="tcp://elsewhere"),
    ],
)
def test_a_grant_of_another_instance_or_incarnation_opens_nothing(decode: object) -> None:
    rig = Rig()
    rig.submit()
    rig.step()
    rig.grant(decode=decode)
    assert rig.sender.sessions == {}
    rig.grant()
    assert rig.handoff().tokens == 10


@pytest.mark.parametrize("first_token", [11, 1 << 40, -1])
def test_a_grant_from_beyond_the_prompt_on_fails_its_attempt_alone(first_token: int) -> None:
    assert_fails_alone(first_token=first_token)


@pytest.mark.parametrize("when", ["as it is admitted", *range(7)])
@pytest.mark.parametrize("first_token", [0, 12, 27, 30])
def test_of_layers_with_windows_what_they_see_is_pushed_whenever_the_grant_comes(when: str | int, first_token: int) -> None:
    """A prompt of five windows in five chunks, whose blocks are given back meanwhile; the cache could not hold all of it."""
    rig = Rig(num_blocks=14, layout=SLIDING, max_num_batched_tokens=6)
    rig.submit(tokens=30, max_tokens=5)
    rig.launch()
    if when == "as it is admitted":
        rig.grant(first_token=first_token)
    rig.collect()
    for step in range(7):
        if when == step:
            rig.grant(first_token=first_token)
        if rig.launch():
            rig.collect()
    pushed = rig.sender.sessions["a"].pushed
    assert pushed.get(0, set()) == set(range(max(first_token, 30 - WINDOW + 1), 30))
    assert pushed.get(1, set()) == set(range(first_token, 30))
    assert rig.handoff().tokens == 30
    rig.worker.delivered(Delivered(attempt="a", kv_bytes=1, transfer_s=0.0))
    assert rig.idle()


@pytest.mark.parametrize("endpoints", [(), ("d:1", "d:2")])
def test_a_grant_of_another_number_of_ranks_fails_its_attempt_alone(endpoints: tuple[str, ...]) -> None:
    assert_fails_alone(endpoints=endpoints)


def test_a_grant_of_everything_fails_its_attempt_alone_where_only_windows_are_kept() -> None:
    assert_fails_alone(SLIDING, windowed=False)


def assert_fails_alone(layout: KVLayout = LAYOUT, **wrong: object) -> None:
    """With the grant of another attempt, all is well."""
    rig = Rig(layout=layout)
    rig.submit("a")
    rig.submit("b")
    rig.step()
    rig.grant("a", **wrong)
    for event in rig.sender.failed:
        rig.worker.send_failed(event)
    assert failure(rig.peers.take(GATEWAY)) == TransferError.code
    rig.grant("b", number=2)
    assert rig.handoff("b").tokens == 10
    assert rig.book.get("a") is None


def test_a_number_that_was_used_before_fails_its_attempt_alone() -> None:
    rig = Rig()
    for attempt in ("a", "b"):
        rig.submit(attempt)
    rig.step()
    rig.grant("a", number=1)
    rig.grant("b", number=1)
    for event in rig.sender.failed:
        rig.worker.send_failed(event)
    assert failure(rig.peers.take(GATEWAY)) == TransferError.code
    assert rig.handoff("a").tokens == 10
    assert rig.book.get("b") is None


def taken_back(rig: Rig, after: int) -> None:
    """A prompt is admitted, read for `after` steps, and loses its blocks to an older one."""
    rig.submit("young", tokens=20, ticket=2)
    for _ in range(after):
        rig.step()
    if not after:
        rig.launch()
    assert rig.said() == [("young", Phase.ADMITTED)]
    rig.submit("old", tokens=20, ticket=1)
    if not after:
        rig.admit()
        rig.collect()
    while ("young", Phase.WAITING) not in (said := rig.said()):
        rig.step()
        assert rig.launches < 20, said


@pytest.mark.parametrize("after", [1, 3])
def test_a_prompt_that_lost_its_blocks_is_read_again_and_pushed_from_its_new_blocks(after: int) -> None:
    rig = Rig(num_blocks=7, max_num_batched_tokens=8, prefix_cache=False)
    taken_back(rig, after)
    rig.grant("young")
    assert "young" not in rig.sender.sessions
    rig.grant("old", number=2)
    while rig.sender.sessions["old"].tail is None:
        rig.step()
    rig.worker.delivered(Delivered(attempt="old", kv_bytes=1, transfer_s=0.0))
    rig.step()
    assert rig.said() == [("young", Phase.ADMITTED)]
    rig.grant("young", number=3)
    while rig.sender.sessions["young"].tail is None:
        rig.step()
    items = [item for m in rig.peers.take(GATEWAY) if isinstance(m, Tokens) for item in m.items if item.attempt == "young"]
    assert len(items) == 1
    assert rig.handoff("young").token == items[0].tokens[0]
    rig.worker.delivered(Delivered(attempt="young", kv_bytes=1, transfer_s=0.0))
    assert rig.idle()


def test_a_grant_for_an_earlier_admission_opens_nothing() -> None:
    rig = Rig(num_blocks=7, max_num_batched_tokens=8, prefix_cache=False)
    asked = rig.book.next_number
    taken_back(rig, 1)
    rig.book.cancel("old")
    rig.step()
    assert rig.said() == [("young", Phase.ADMITTED)]
    rig.grant("young", answers=asked)
    assert "young" not in rig.sender.sessions
    rig.grant("young", answers=rig.book.next_number - 1)
    assert "young" in rig.sender.sessions


def test_what_a_step_still_writes_to_blocks_that_were_taken_back_is_not_pushed() -> None:
    rig = Rig()
    rig.submit("a", tokens=2 * BLOCK_SIZE)
    rig.launch()
    sequence = rig.engine._sequences["a"]
    rig.worker.taken_back("a", rig.launches)
    rig.collect()  # of the step that was under way
    rig.worker.admitted("a")
    rig.worker._readings["a"].first = None
    rig.grant()
    assert sequence.computed_tokens == 2 * BLOCK_SIZE
    assert rig.sender.sessions["a"].pushed == {}


def test_a_pinned_prompt_keeps_its_blocks() -> None:
    rig = Rig(num_blocks=7, prefix_cache=False)
    rig.submit("young", tokens=20, ticket=2)
    rig.step()
    rig.grant("young")
    rig.submit("old", tokens=20, ticket=1)
    for _ in range(3):
        rig.step()
    assert [attempt for attempt, _ in rig.said()] == ["young"]
    assert rig.sender.sessions["young"].aborted is None


@pytest.mark.parametrize("layout", [LAYOUT, SLIDING])
def test_kv_from_the_prefix_cache_is_pushed_too(layout: KVLayout) -> None:
    rig = Rig(layout=layout)
    for number, attempt in enumerate(("a", "b")):
        rig.submit(attempt)
        rig.step()
        rig.grant(attempt, number=number)
        assert rig.sender.sessions[attempt].tail is not None
        rig.worker.delivered(Delivered(attempt=attempt, kv_bytes=1, transfer_s=0.0))
    assert rig.idle()


@pytest.mark.parametrize("granted", [True, False])
def test_a_first_token_that_ends_the_request_ends_the_hand_off(granted: bool) -> None:
    rig = Rig()
    rig.submit(max_tokens=1)
    rig.launch()
    if granted:
        rig.grant()
    rig.collect()
    assert (rig.sender.sessions["a"].aborted is not None) if granted else not rig.sender.sessions
    assert Withdrawn in [type(message) for message in rig.peers.take(DECODE)]
    (tokens,) = rig.peers.take(GATEWAY)
    assert isinstance(tokens, Tokens)
    assert tokens.items[0].finish is not None
    assert rig.idle()


def test_a_failed_transfer_is_reported_to_both_sides_and_freed() -> None:
    rig = Rig()
    rig.submit()
    rig.step()
    rig.grant()
    rig.worker.send_failed(SendFailed(attempt="a", error=TransferAborted("the peer is gone")))
    assert failure(rig.peers.take(GATEWAY)) == TransferAborted.code
    assert Withdrawn in [type(message) for message in rig.peers.take(DECODE)]
    assert rig.idle()


def test_a_lost_commit_is_made_up_for_by_the_decode_sides_word() -> None:
    rig = Rig()
    rig.submit()
    rig.step()
    rig.grant()
    rig.peers.sent.clear()
    rig.book.renewed(DECODE, 1, AttemptState("a", Phase.GRANTED))
    assert len(rig.book) == 1
    rig.book.renewed(DECODE, 2, AttemptState("a", Phase.RUNNING))
    assert rig.sender.sessions["a"].ended
    assert rig.peers.sent == []
    assert rig.idle()


@pytest.mark.parametrize("tokens", [199, 0])
def test_a_refused_submission_tells_gateway_and_decode_side(tokens: int) -> None:
    rig = Rig()
    rig.submit(tokens=tokens)
    assert [type(message) for message in rig.peers.take(GATEWAY)] == [Failed]
    assert [type(message) for message in rig.peers.take(DECODE)] == [Withdrawn]
    assert rig.idle()


def test_cancel_says_nothing_and_frees() -> None:
    rig = Rig()
    rig.submit()
    rig.step()
    rig.grant()
    rig.peers.sent.clear()
    rig.book.cancel("a")
    assert rig.sender.sessions["a"].aborted == "cancelled"
    assert rig.peers.sent == []
    assert rig.idle()
