"""Whom the gateway asks for what, and when it gives up: in virtual time."""

from __future__ import annotations

import pytest

from core.messages import Address, Keep, TokenItem, Wanted
from gateway.serving.awaited import MOST_WANTED, Awaited, AwaitedAttempts
from gateway.text.token_reader import TextOptions, TokenReader

GATEWAY = Address("gateway", 1, "tcp://gateway")
P, D = Address("p0", 1, "tcp://p0"), Address("d0", 1, "tcp://d0")
LEASE_S = 5.0


def reader() -> TokenReader:
    return TokenReader([], TextOptions(lambda ids: "".join(map(chr, ids))))


class Watched:
    """AwaitedAttempts and the keeps that came of them, as `(second, worker, wanted)`."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.routes = AwaitedAttempts(GATEWAY, LEASE_S, 0.0)
        self.asked: list[tuple[float, str, tuple[Wanted, ...]]] = []

    def open(self, attempt: str, decode: Address = D, prefill: Address | None = P) -> TokenReader:
        made = reader()
        self.routes.open(attempt, Awaited(made, decode, prefill, self.now_s))
        return made

    def take(self, attempt: str, worker: Address, position: int, count: int = 1) -> None:
        route = self.routes.find(attempt, worker)
        assert route is not None
        item = TokenItem(attempt=attempt, position=position, tokens=(97,) * count)
        self.routes.took(attempt, route.reader.take((worker.name, worker.incarnation), item), self.now_s)

    def run(self, seconds: float) -> None:
        until_s = self.now_s + seconds
        while self.now_s < until_s:
            self.now_s += 0.125
            for worker, keep in self.routes.keeps(self.now_s):
                assert keep.gateway == GATEWAY
                self.asked.append((self.now_s, worker.name, keep.wanted))

    def asked_s(self, worker: str, attempt: str) -> list[float]:
        return [at_s for at_s, name, wanted in self.asked if name == worker and attempt in [item.attempt for item in wanted]]


@pytest.fixture
def watched() -> Watched:
    return Watched()


def test_both_workers_are_asked_five_times_a_lease_from_the_next_position_on(watched: Watched) -> None:
    watched.open("a")
    watched.run(1.0)
    assert watched.asked_s("p0", "a") == watched.asked_s("d0", "a") == [1.0]
    watched.take("a", P, 0)
    watched.run(3.0)
    assert watched.asked_s("p0", "a") == watched.asked_s("d0", "a") == [1.0, 2.0, 3.0, 4.0]
    assert [wanted for _, _, wanted in watched.asked] == [(Wanted("a", 1),), (Wanted("a", 0),)] + 6 * [(Wanted("a", 1),)]


def test_an_attempt_so_young_that_its_submit_may_be_on_its_way_is_not_asked_for(watched: Watched) -> None:
    watched.run(0.5)
    watched.open("a")
    watched.run(1.0)
    assert watched.asked == []
    watched.run(1.0)
    assert watched.asked_s("d0", "a") == [2.0]


def test_a_lost_submit_is_asked_about_three_times_within_a_lease_whenever_it_was_sent(watched: Watched) -> None:
    for eighth in range(9):
        watched.now_s = eighth / 8
        watched.open(f"a{eighth}")
    watched.run(10.0)
    for eighth in range(9):
        assert len([at_s for at_s in watched.asked_s("d0", f"a{eighth}") if at_s <= eighth / 8 + LEASE_S]) >= 3


def test_prefill_is_asked_until_a_token_of_the_decode_worker_is_read(watched: Watched) -> None:
    watched.open("a")
    watched.take("a", P, 0)
    watched.take("a", D, 2)  # waits for position 1: prefill's part may still be needed
    watched.run(1.0)
    assert watched.asked_s("p0", "a") != []
    watched.take("a", D, 1)
    watched.asked.clear()
    watched.run(5.0)
    assert watched.asked_s("p0", "a") == []
    assert len(watched.asked_s("d0", "a")) == 5


def test_the_only_worker_of_an_attempt_is_asked_to_the_end_and_nobody_after_it(watched: Watched) -> None:
    watched.open("a", prefill=None)
    watched.take("a", D, 0)
    watched.run(2.0)
    assert watched.asked_s("d0", "a") == [1.0, 2.0]
    watched.routes.drop("a")
    watched.run(5.0)
    assert watched.asked_s("d0", "a") == [1.0, 2.0]
    assert len(watched.routes) == 0


def test_a_gap_is_asked_for_at_short_intervals_until_it_closes(watched: Watched) -> None:
    watched.run(1.125)
    watched.open("a", prefill=None)
    watched.open("b", prefill=None)
    watched.take("a", D, 1)
    watched.run(0.75)
    assert watched.asked_s("d0", "a") == [1.375, 1.625, 1.875]
    assert watched.asked_s("d0", "b") == []
    watched.take("a", D, 0)
    watched.asked.clear()
    watched.run(1.25)
    assert watched.asked_s("d0", "a") == [3.0]
    assert watched.routes.lost(100.0) == []


def test_an_older_gap_is_asked_for_in_the_usual_rounds(watched: Watched) -> None:
    watched.open("a", prefill=None)
    watched.take("a", D, 1)
    watched.run(4.0)
    assert watched.asked_s("d0", "a") == [0.25, 0.5, 0.75, 1.0, 2.0, 3.0, 4.0]


def test_what_came_ahead_of_prefills_token_is_not_asked_for_again(watched: Watched) -> None:
    watched.open("a")
    for position, count in ((1, 2), (3, 1), (6, 2)):
        watched.take("a", D, position, count)
    watched.run(0.25)
    assert [(worker, wanted) for _, worker, wanted in watched.asked] == [("d0", (Wanted("a", 4),)), ("p0", (Wanted("a", 0),))]
    watched.take("a", P, 0)
    watched.asked.clear()
    watched.run(0.25)
    assert [(worker, wanted) for _, worker, wanted in watched.asked] == [("d0", (Wanted("a", 4),))]


def test_an_attempt_that_goes_on_misses_nothing_of_what_came_before_it(watched: Watched) -> None:
    first = watched.open("a", prefill=None)
    watched.take("a", D, 0, 3)
    watched.routes.drop("a")
    watched.routes.open("b", Awaited(first, D, P, watched.now_s, begin=3))
    watched.run(1.0)
    assert [(worker, wanted) for _, worker, wanted in watched.asked] == [("d0", (Wanted("b", 4),)), ("p0", (Wanted("b", 3),))]


def test_a_gap_that_stays_is_a_loss_after_a_lease_and_not_before(watched: Watched) -> None:
    watched.open("a")
    watched.take("a", D, 3)
    watched.run(LEASE_S)
    assert watched.routes.lost(watched.now_s) == []
    watched.take("a", D, 4)
    assert watched.routes.lost(watched.now_s + 0.01) == ["a"]


def test_a_gap_that_closed_and_one_that_opens_later_are_two(watched: Watched) -> None:
    watched.open("a")
    watched.take("a", D, 1)
    watched.run(4.0)
    watched.take("a", D, 0)
    watched.take("a", D, 3)
    watched.run(4.0)
    assert watched.routes.lost(watched.now_s) == []


def test_only_the_very_incarnations_at_their_very_mailboxes_serve_an_attempt(watched: Watched) -> None:
    watched.open("a")
    assert watched.routes.find("a", D)
    assert watched.routes.find("a", P)
    for stranger in (Address("d0", 2, D.mailbox), Address("d0", 1, "tcp://elsewhere"), Address("x", 1, D.mailbox)):
        assert watched.routes.find("a", stranger) is None
    assert watched.routes.find("b", D) is None


def test_more_attempts_than_a_message_takes_make_several(watched: Watched) -> None:
    for number in range(2 * MOST_WANTED + 1):
        watched.open(f"a{number}", prefill=None)
    watched.run(1.0)
    sizes = [len(wanted) for _, _, wanted in watched.asked]
    assert sizes == [MOST_WANTED, MOST_WANTED, 1]
    assert {item.attempt for _, _, wanted in watched.asked for item in wanted} == {f"a{n}" for n in range(2 * MOST_WANTED + 1)}


def test_a_keep_fits_the_wire() -> None:
    from core.wire import decode, encode

    keep = Keep(gateway=GATEWAY, wanted=tuple(Wanted(f"a{n}", n) for n in range(MOST_WANTED)))
    assert decode(encode(keep)) == keep
