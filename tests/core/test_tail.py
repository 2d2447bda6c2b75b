"""Tokens that may be lost are sent again, those on their way are not, and nothing is kept that has arrived."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.messages import TokenItem
from core.tail import Tail


def item(position: int, *tokens: int) -> TokenItem:
    return TokenItem(attempt="a", position=position, tokens=tokens or (position,))


def test_what_was_sent_since_the_last_question_is_on_its_way() -> None:
    tail = Tail()
    tail.add(item(0))
    assert tail.asked(0, 0.0) == ()
    tail.add(item(1))
    assert tail.asked(0, 0.0) == (item(0),)
    assert tail.asked(0, 0.0) == (item(0), item(1))


def test_what_has_arrived_is_forgotten_and_half_an_item_is_not() -> None:
    tail = Tail()
    tail.add(item(0, 5, 6))
    tail.add(item(2))
    tail.asked(0, 0.0)
    assert tail.asked(1, 0.0) == (item(0, 5, 6), item(2))
    assert tail.asked(2, 0.0) == (item(2),)
    assert tail.asked(3, 0.0) == ()
    assert len(tail) == 0


def test_an_old_question_brings_nothing_back() -> None:
    tail = Tail()
    for position in range(4):
        tail.add(item(position))
    tail.asked(0, 0.0)
    tail.asked(3, 0.0)
    assert tail.asked(1, 0.0) == (item(3),)


def test_repetitions_are_in_vain_since_they_began_until_one_token_arrives() -> None:
    tail = Tail()
    for position in range(3):
        tail.add(item(position))
    for now_s in (0.0, 1.0):
        tail.asked(0, now_s)
        assert tail.repeating_for_s(now_s) == 0.0
    tail.asked(0, 4.0)
    assert tail.repeating_for_s(4.0) == 3.0
    tail.asked(1, 5.0)
    assert tail.repeating_for_s(5.0) == 0.0
    tail.asked(1, 6.0)
    tail.asked(0, 8.0)
    assert tail.repeating_for_s(8.0) == 2.0
    tail.asked(3, 9.0)
    assert tail.repeating_for_s(20.0) == 0.0


def test_a_gateway_that_has_all_of_a_slow_stream_asks_in_no_way_in_vain() -> None:
    tail = Tail()
    tail.add(item(0))
    for now_s in range(100):
        tail.asked(1, float(now_s))
        assert tail.repeating_for_s(float(now_s)) == 0.0


@given(st.lists(st.one_of(st.just("emit"), st.integers(0, 6)), max_size=60), st.randoms())
def test_whatever_is_lost_arrives_as_long_as_anything_does(script: list[object], dice: object) -> None:
    """The gateway gets each message or does not; it asks from the first position that it lacks."""
    tail, got, emitted = Tail(), set[int](), 0

    def position() -> int:
        return next(at for at in range(emitted + 1) if at not in got)

    for step in script:
        if step == "emit":
            tail.add(item(emitted))
            if dice.random() < 0.5:
                got.add(emitted)
            emitted += 1
        else:
            got |= {again.position for again in tail.asked(position(), 0.0) if dice.random() < 0.5}
    for _ in range(2):
        got |= {again.position for again in tail.asked(position(), 0.0)}
    assert got == set(range(emitted))
    tail.asked(emitted, 0.0)
    assert len(tail) == 0
