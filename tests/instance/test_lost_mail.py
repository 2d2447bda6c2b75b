"""Any message between a gateway and a pair of instances may be lost, come twice, late, or out of order, whatever is going on:
each stream ends in exact tokens or in one typed error within three leases of its last progress, and nothing is left over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from core.attempts import Phase
from core.messages import Cancel, Failed, Grant, Keep, Message, Renew, Submit, Tokens, Withdrawn
from tests.instance.pair import LEASE_S, Pair, Stream

Fate = Callable[[str, str, Message], list[float] | None]


@dataclass(frozen=True)
class Hit:
    """What a fault applies to: messages of a type, from a sender, to a receiver, that `match`."""

    kind: type[Message]
    sender: str = ""
    receiver: str = ""
    match: Callable[[Message], bool] = lambda message: True

    def __call__(self, sender: str, receiver: str, message: Message) -> bool:
        return isinstance(message, self.kind) and self.sender in sender and self.receiver in receiver and self.match(message)


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
    **{f"prefill says {phase.value}": Hit(Renew, "prefill", match=says(phase)) for phase in list(Phase)[:3]},
    **{f"decode says {phase.value}": Hit(Renew, "decode", match=says(phase)) for phase in list(Phase)[:4]},
    "prefill withdraws": Hit(Withdrawn, "prefill"),
    "decode withdraws": Hit(Withdrawn, "decode"),
    "tokens of prefill": Hit(Tokens, "prefill"),
    "tokens of decode": Hit(Tokens, "decode"),
    "failure of prefill": Hit(Failed, "prefill"),
    "failure of decode": Hit(Failed, "decode"),
}
FAULTS: dict[str, Callable[[int], list[float] | None]] = {
    "first lost": lambda count: [] if count == 0 else None,
    "second lost": lambda count: [] if count == 1 else None,
    "first two lost": lambda count: [] if count < 2 else None,
    "all lost": lambda count: [],
    "all twice": lambda count: [2e-4, 3e-4],
    "twice, much later": lambda count: [2e-4, LEASE_S * 0.8],
    "late": lambda count: [LEASE_S * 0.5],
    "very late": lambda count: [LEASE_S * 2.5],
    "out of order": lambda count: [0.5 if count % 2 == 0 else 2e-4],
}


def plain(pair: Pair) -> list[Stream]:
    return [pair.submit()]


def first_token_ends(pair: Pair) -> list[Stream]:
    return [pair.submit(max_tokens=1)]


def contended(pair: Pair) -> list[Stream]:
    """Room for two of them at a time on the decode side, and for three on the prefill side."""
    return [pair.submit(prompt_tokens=20, max_tokens=40) for _ in range(6)]


def cancelled(pair: Pair) -> list[Stream]:
    streams = [pair.submit(max_tokens=100) for _ in range(2)]
    pair.run(0.5)
    for stream in streams:
        pair.gateway.cancel(stream)
    return streams


def never_fits(pair: Pair) -> list[Stream]:
    """The decode side finds out only when it is to make room."""
    return [pair.submit(prompt_tokens=20, max_tokens=300)]


def past_the_deadline(pair: Pair) -> list[Stream]:
    return [pair.submit(max_tokens=300, deadline_s=1.0)]


SCENES: dict[str, tuple[Callable[[Pair], list[Stream]], int, int]] = {
    "plain": (plain, 64, 64),
    "first token ends": (first_token_ends, 64, 64),
    "contended": (contended, 18, 32),
    "cancelled": (cancelled, 64, 64),
    "never fits": (never_fits, 64, 64),
    "past the deadline": (past_the_deadline, 128, 128),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("hit", HITS)
@pytest.mark.parametrize("scene", SCENES)
def test_every_message_lost_repeated_late_and_out_of_order(scene: str, hit: str, fault: str) -> None:
    begin, prefill_blocks, decode_blocks = SCENES[scene]
    pair = Pair(prefill_blocks, decode_blocks)
    hits, count = HITS[hit], 0

    def fate(sender: str, receiver: str, message: Message) -> list[float] | None:
        nonlocal count
        if not hits(sender, receiver, message):
            return None
        count += 1
        return FAULTS[fault](count - 1)

    if fault == "all lost" and hits.kind is Failed:
        pytest.skip("a gateway that no failure ever reaches has its own deadline")
    pair.faults(fate)
    begin(pair)
    pair.settle()
    pair.check()


def test_every_kind_of_message_is_sent_in_some_scene() -> None:
    unseen = dict(HITS)

    def fate(sender: str, receiver: str, message: Message) -> list[float] | None:
        for name, hits in list(unseen.items()):
            if hits(sender, receiver, message):
                del unseen[name]
        return None

    for begin, prefill_blocks, decode_blocks in SCENES.values():
        pair = Pair(prefill_blocks, decode_blocks)
        pair.faults(fate)
        begin(pair)
        pair.settle()
        pair.check()
    assert list(unseen) == []
