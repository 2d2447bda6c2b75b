from __future__ import annotations

import random

import pytest

from engine.sequence import Sequence
from engine.waiting_queue import WaitingQueue, order_of
from tests.support.engines import sequence


def claim(name: str, tokens: int = 2, *, ticket: int = 0, incoming: bool = False) -> Sequence:
    made = sequence(name, list(range(tokens)), ticket=ticket)
    made.incoming = incoming
    return made


def test_members_stand_in_order_of_ticket_and_of_arrival_without_one() -> None:
    queue = WaitingQueue()
    members = [claim(f"s{index}", ticket=ticket) for index, ticket in enumerate([5, 0, 3, 0, 4])]
    for arrival, member in enumerate(members):
        queue.push(member, order_of(member, arrival))
    assert [member.sequence_id for member in queue] == ["s1", "s3", "s2", "s4", "s0"]
    assert (queue.at(0), queue.at(4), queue.at(5)) == (members[1], members[0], None)


@pytest.mark.parametrize("seed", range(5))
def test_a_queue_forgets_who_left_and_counts_who_is_there(seed: int) -> None:
    rng = random.Random(seed)
    queue, members = WaitingQueue(), {}
    for arrival in range(200):
        member = claim(f"s{arrival}", rng.randint(1, 9), ticket=rng.randint(0, 20), incoming=rng.random() < 0.5)
        members[member.sequence_id] = member
        queue.push(member, order_of(member, arrival))
        if rng.random() < 0.6:
            gone = rng.choice(list(members))
            assert queue.remove(gone)
            assert not queue.remove(gone)
            del members[gone]
        assert queue.check() == []
        assert {member.sequence_id for member in queue} == set(members)
    assert len(queue) == len(members)
    assert queue.tokens == sum(len(member.tokens) for member in members.values())
    assert queue.reservations == sum(member.incoming for member in members.values())


def test_an_id_that_comes_again_is_another_member() -> None:
    queue = WaitingQueue()
    first, again = claim("same", 2), claim("same", 3)
    queue.push(first, order_of(first, 0))
    queue.remove("same")
    queue.push(again, order_of(again, 1))
    assert (list(queue), queue.tokens) == ([again], 3)
