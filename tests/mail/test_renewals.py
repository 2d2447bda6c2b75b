"""Renewals: one message a peer and period, numbered, never larger than the wire takes."""

from __future__ import annotations

from core.attempts import Phase
from core.clock import ManualClock
from core.messages import AttemptState, Renew
from mail.renewals import MOST_STATES, PER_LEASE, Renewals
from tests.support.workers import DECODE, GATEWAY, LEASE_S, PREFILL, FakePeers


def test_it_is_time_again_after_a_part_of_a_lease() -> None:
    clock = ManualClock()
    renewals = Renewals(PREFILL, FakePeers(), clock, LEASE_S)
    assert not renewals.due()
    clock.advance(LEASE_S / PER_LEASE)
    assert renewals.due()
    assert not renewals.due()


def test_each_peer_hears_of_its_own_and_numbers_go_up() -> None:
    peers = FakePeers()
    renewals = Renewals(PREFILL, peers, ManualClock(), LEASE_S)
    for _ in range(2):
        renewals.send([(DECODE, "a", Phase.WAITING), (GATEWAY, "b", Phase.GRANTED), (DECODE, "c", Phase.ADMITTED)])
    states = (AttemptState("a", Phase.WAITING), AttemptState("c", Phase.ADMITTED))
    assert peers.take(DECODE) == [Renew(worker=PREFILL, number=number, states=states) for number in (1, 3)]
    assert renewals.number == 4


def test_more_attempts_than_a_message_takes_make_several_with_numbers_of_their_own() -> None:
    peers = FakePeers()
    Renewals(PREFILL, peers, ManualClock(), LEASE_S).send(
        (DECODE, str(index), Phase.WAITING) for index in range(2 * MOST_STATES + 1)
    )
    sent = peers.take(DECODE)
    assert [(message.number, len(message.states)) for message in sent if isinstance(message, Renew)] == [
        (1, MOST_STATES),
        (2, MOST_STATES),
        (3, 1),
    ]
