"""One message per gateway and step, in order, and never larger than the wire takes."""

from __future__ import annotations

from typing import cast

from core.clock import ManualClock
from core.messages import Address, Failed, Message, TokenItem, Tokens
from core.wire import decode, encode
from mail.outbox import MOST_ITEMS, Outbox
from mail.peers import MessageSender

WORKER = Address("decode", 1, "tcp://decode")
GATEWAYS = [Address(f"gateway{index}", 1, f"tcp://gateway{index}") for index in range(2)]


class RecordingPeers:
    def __init__(self) -> None:
        self.sent: list[tuple[str, Message]] = []

    def send(self, endpoint: str, message: Message) -> bool:
        self.sent.append((endpoint, decode(encode(message))))
        return True


def item(attempt: str) -> TokenItem:
    return TokenItem(attempt=attempt, position=0, tokens=(1,))


def test_a_step_sends_each_gateway_one_message() -> None:
    peers, clock = RecordingPeers(), ManualClock()
    outbox = Outbox(WORKER, cast(MessageSender, peers), clock)
    for index in range(6):
        outbox.tokens(GATEWAYS[index % 2], item(str(index)))
        clock.advance(1.0)
    outbox.flush()
    outbox.flush()
    assert [(endpoint, [i.attempt for i in cast(Tokens, message).items]) for endpoint, message in peers.sent] == [
        (GATEWAYS[0].mailbox, ["0", "2", "4"]),
        (GATEWAYS[1].mailbox, ["1", "3", "5"]),
    ]
    assert [cast(Tokens, message).age_s for _, message in peers.sent] == [6.0, 5.0]


def test_a_failure_follows_the_tokens_before_it() -> None:
    peers = RecordingPeers()
    outbox = Outbox(WORKER, cast(MessageSender, peers), ManualClock())
    outbox.tokens(GATEWAYS[0], item("a"))
    outbox.failed(GATEWAYS[0], Failed(worker=WORKER, attempt="a", code="engine_fault", message="broken"))
    assert [type(message) for _, message in peers.sent] == [Tokens, Failed]


def test_more_sequences_than_a_message_takes_make_several() -> None:
    peers = RecordingPeers()
    outbox = Outbox(WORKER, cast(MessageSender, peers), ManualClock())
    count = 5 * MOST_ITEMS + 1
    for index in range(count):
        outbox.tokens(GATEWAYS[0], item(str(index)))
    outbox.flush()
    assert [i.attempt for _, message in peers.sent for i in cast(Tokens, message).items] == [str(i) for i in range(count)]
