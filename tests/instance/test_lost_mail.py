"""Any message between a gateway and a pair of instances may be lost, come twice, late, or out of order, whatever is going on:
each stream ends in exact tokens or in one typed error within three leases of its last progress, and nothing is left over."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from core.attempts import Phase
from core.config import Role
from core.messages import Cancel, Failed, Grant, Keep, Message, Renew, Submit, Tokens, Withdrawn
from instance.loop import TransferEvent
from kv_transfer.events import Delivered, Received
from mail.faults import Delay, Drop, Duplicate, Fault, Letter, Reorder
from tests.instance.pair import LEASE_S, STEP_S, Pair, Stream


@dataclass(frozen=True)
class Hit:
    """What a fault applies to: messages of a type, from a sender, to a receiver, that `match`."""

    kind: type[Message]
    sender: str = ""
    receiver: str = ""
    match: Callable[[Message], bool] = lambda message: True

    def __call__(self, letter: Letter) -> bool:
        there = self.sender in letter.sender and self.receiver in letter.endpoint
        return there and isinstance(letter.message, self.kind) and self.match(letter.message)


def says(phase: Phase) -> Callable[[Message], bool]:
    return lambda message: isinstance(message, Renew) and any(state.phase is phase for state in message.states)


HITS = {
    "submit to prefill": Hit(Submit, receiver="prefill"),
    "submit to decode": Hit(Submit, receiver="decode"),
    "keep to prefill": Hit(Keep, receiver="prefill"),
    "keep to decode": Hit(Keep, receiver="decode"),
    "cancel to prefill": Hit(Cancel, receiver="prefill"),
    "cancel to decode": Hit(Cancel, receiver="decode"),
    "grant": Hit(Grant),
    "prefill says waiting": Hit(Renew, "prefill", match=says(Phase.WAITING)),
    "prefill says admitted": Hit(Renew, "prefill", match=says(Phase.ADMITTED)),
    "prefill says granted": Hit(Renew, "prefill", match=says(Phase.GRANTED)),
    "decode says waiting": Hit(Renew, "decode", match=says(Phase.WAITING)),
    "decode says admitted": Hit(Renew, "decode", match=says(Phase.ADMITTED)),
    "decode says granted": Hit(Renew, "decode", match=says(Phase.GRANTED)),
    "decode says running": Hit(Renew, "decode", match=says(Phase.RUNNING)),
    "prefill withdraws": Hit(Withdrawn, "prefill"),
    "decode withdraws": Hit(Withdrawn, "decode"),
    "tokens of prefill": Hit(Tokens, "prefill"),
    "tokens of decode": Hit(Tokens, "decode"),
    "failure of prefill": Hit(Failed, "prefill"),
    "failure of decode": Hit(Failed, "decode"),
}
FAULTS: dict[str, Callable[[int], Fault | None]] = {
    "first lost": lambda count: Drop() if count == 0 else None,
    "second lost": lambda count: Drop() if count == 1 else None,
    "first two lost": lambda count: Drop() if count < 2 else None,
    "all lost": lambda count: Drop(),
    "all twice": lambda count: Duplicate(),
    "twice, much later": lambda count: Duplicate(LEASE_S * 0.8),
    "late": lambda count: Delay(LEASE_S * 0.5),
    "very late": lambda count: Delay(LEASE_S * 2.5),
    "out of order": lambda count: Reorder(LEASE_S) if count % 2 == 0 else None,
}


def plain(pair: Pair) -> list[Stream]:
    return [pair.submit()]


def first_token_ends(pair: Pair) -> list[Stream]:
    return [pair.submit(max_tokens=1)]


def contended(pair: Pair) -> list[Stream]:
    """Room for two of them at a time on the decode side, and for three on the prefill side."""
    return [pair.submit(prompt_tokens=20, max_tokens=40) for _ in range(9)]


def crossed(pair: Pair) -> list[Stream]:
    """Each of the two reads for the other, and neither has room for all: prompts lose their blocks to older claims."""
    pair.decode.loop.set_role(Role.MIXED)
    pair.prefill.loop.set_role(Role.MIXED)
    sides = [pair.prefill.address, pair.decode.address]
    prompts = [[(7 * count + index) % 100 for index in range(24)] for count in range(8)]
    return [pair.gateway.submit(prompt, 20, sides[at % 2], sides[1 - at % 2]) for at, prompt in enumerate(prompts)]


def slow_transfer(pair: Pair) -> list[Stream]:
    pair.fabric.bytes_per_s = 1000.0
    return [pair.submit(prompt_tokens=20)]


def cancelled(pair: Pair) -> list[Stream]:
    streams = [pair.submit(max_tokens=100) for _ in range(2)]
    pair.run(0.25)
    for stream in streams:
        pair.gateway.cancel(stream)
    return streams


def commit_lost(pair: Pair) -> list[Stream]:
    """The prefill side is never told that its KV was committed, but by the decode side's renewals."""
    on_event = pair.prefill.sender.on_event
    pair.prefill.sender.on_event = lambda event: None if isinstance(event, Delivered) else on_event(event)
    return [pair.submit(max_tokens=200)]


def never_fits(pair: Pair) -> list[Stream]:
    """The decode side finds out only when it is to make room."""
    return [pair.submit(prompt_tokens=20, max_tokens=300)]


def never_fits_prefill(pair: Pair) -> list[Stream]:
    return [pair.submit(prompt_tokens=20, max_tokens=4)]


def past_the_deadline(pair: Pair) -> list[Stream]:
    """Some while they run, some while they wait."""
    return [pair.submit(prompt_tokens=20, max_tokens=100, deadline_s=1.75) for _ in range(6)]


SCENES: dict[str, tuple[Callable[[Pair], list[Stream]], int, int]] = {
    "plain": (plain, 64, 64),
    "first token ends": (first_token_ends, 64, 64),
    "contended": (contended, 18, 32),
    "crossed": (crossed, 14, 14),
    "slow transfer": (slow_transfer, 64, 64),
    "cancelled": (cancelled, 64, 64),
    "commit lost": (commit_lost, 64, 128),
    "never fits": (never_fits, 64, 64),
    "never fits on the prefill side": (never_fits_prefill, 4, 64),
    "past the deadline": (past_the_deadline, 18, 64),
}


SERVED = ("plain", "first token ends", "contended", "crossed", "slow transfer", "commit lost")
"""Scenes in which all is served if no message is lost."""
REPAIRED = ("first lost", "second lost", "all twice", "twice, much later", "late", "out of order")
"""Faults after which it still is."""


@functools.cache
def undisturbed_s(scene: str) -> float:
    """How long the scene takes when no message is lost: so long, work may rightly wait for other work."""
    begin, prefill_blocks, decode_blocks = SCENES[scene]
    pair = Pair(prefill_blocks, decode_blocks)
    streams = begin(pair)
    pair.settle()
    return max(stream.ended_s or 0.0 for stream in streams)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("hit", HITS)
@pytest.mark.parametrize("scene", SCENES)
def test_every_message_lost_repeated_late_and_out_of_order(scene: str, hit: str, fault: str) -> None:
    begin, prefill_blocks, decode_blocks = SCENES[scene]
    hits, count = HITS[hit], itertools.count()
    if fault == "all lost" and hits.kind is Failed:
        pytest.skip("a gateway that no failure ever reaches has its own deadline")
    pair = Pair(prefill_blocks, decode_blocks, lambda letter: FAULTS[fault](next(count)) if hits(letter) else None)
    streams = begin(pair)
    pair.settle()
    pair.check(undisturbed_s(scene))
    if scene in SERVED and fault in REPAIRED and hits.kind is not Submit:
        assert all(stream.complete for stream in streams), "what is lost once, or comes twice or late, costs no attempt"


def test_in_these_scenes_every_kind_of_message_is_sent_and_nothing_fails_that_need_not() -> None:
    unseen = dict(HITS)

    def watch(letter: Letter) -> None:
        for name in [name for name, hits in unseen.items() if hits(letter)]:
            del unseen[name]

    for name, (begin, prefill_blocks, decode_blocks) in SCENES.items():
        pair = Pair(prefill_blocks, decode_blocks, watch)
        streams = begin(pair)
        pair.settle()
        pair.check()
        if name in SERVED:
            assert all(stream.complete for stream in streams)
    assert list(unseen) == []


def test_the_work_of_a_gateway_that_dies_ends_within_a_lease() -> None:
    pair = Pair(64, 400)
    for _ in range(4):
        pair.submit(prompt_tokens=20, max_tokens=300)
    pair.run(2 * LEASE_S)
    assert all(len(stream.tokens) > 50 for stream in pair.gateway.streams.values())
    pair.gateway.dead = True
    pair.run(LEASE_S + 0.2)
    assert pair.prefill.left_over() + pair.decode.left_over() == []


def test_a_commit_that_is_lost_holds_the_prefill_side_for_less_than_a_lease() -> None:
    pair = Pair(64, 200)
    (stream,) = commit_lost(pair)
    pair.run(LEASE_S)
    assert pair.prefill.left_over() == []
    pair.settle()
    assert stream.complete


@pytest.mark.parametrize("late", [Received, Delivered])
def test_a_loop_that_hears_of_a_commit_after_its_peer_loses_nothing(late: type[TransferEvent]) -> None:
    """The sender's side hears of a commit over the wire, the receiver's own loop from a thread that may sleep meanwhile."""
    pair = Pair(64, 200)
    pair.hand_over_s = lambda event: 0.9 * LEASE_S if isinstance(event, late) else 0.0
    streams = [pair.submit(max_tokens=20) for _ in range(3)]
    pair.settle()
    assert all(stream.complete and not stream.failures for stream in streams)
    pair.check(waits_s=LEASE_S)


def test_a_first_token_that_ends_all_is_not_taken_for_a_failure_because_the_session_ends_first() -> None:
    """The decode side hears over the KV connection that the session is over, and the mail that says why comes later."""
    late = (Tokens, Withdrawn)
    pair = Pair(plan=lambda letter: Delay(0.5 * LEASE_S) if isinstance(letter.message, late) else None, step_s=STEP_S)
    stream = pair.submit(max_tokens=1, prompt_tokens=150)
    pair.settle()
    assert stream.complete
    assert stream.failures == []
    pair.check()


def test_a_session_that_ends_with_no_word_from_the_prefill_side_ends_in_one_error() -> None:
    lost = (Failed, Tokens, Withdrawn)
    pair = Pair(
        plan=lambda letter: Drop() if isinstance(letter.message, lost) and "prefill" in letter.sender else None, step_s=STEP_S
    )
    stream = pair.submit(max_tokens=1, prompt_tokens=150)
    pair.settle()
    pair.check()
    assert [failed.worker.name for failed in stream.failures] == ["decode"]


def test_a_cancel_that_is_lost_is_made_up_for_within_a_lease() -> None:
    pair = Pair(64, 200, lambda letter: Drop() if isinstance(letter.message, Cancel) else None)
    stream, other = (pair.submit(max_tokens=300) for _ in range(2))
    pair.run(2 * LEASE_S)
    pair.gateway.cancel(stream)
    pair.run(LEASE_S + 0.2)
    assert len(pair.decode.book) == 1
    assert pair.decode.book.get(other.attempt) is not None


def test_a_restarted_instance_answers_for_what_it_lost_and_its_peer_frees() -> None:
    pair = Pair(64, 200)
    stream = pair.submit(max_tokens=300)
    pair.run(LEASE_S)
    before = len(stream.tokens)
    pair.restart(pair.decode)
    pair.run(0.1)
    again = pair.submit()
    pair.run(LEASE_S)
    assert before > 20
    assert again.complete
    assert pair.prefill.left_over() == []
