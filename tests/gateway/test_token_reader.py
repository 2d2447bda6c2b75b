"""Items in, one ordered text out."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from core.messages import ServedBy, TokenItem, TokenLogprobs
from core.request import FinishReason
from gateway.text.token_reader import TextOptions, TokenReader

WORKER = ("w", 1)


def decode(ids: list[int]) -> str:
    return "".join(chr(token) for token in ids)


def item(text: str, position: int, count: int, end: int, **fields) -> TokenItem:
    tokens = tuple(map(ord, text[position : position + count]))
    finish = FinishReason.LENGTH if position + count >= end else None
    return TokenItem(attempt="a", position=position, tokens=tokens, finish=finish, **fields)


def read(reader: TokenReader, items) -> tuple[str, list[int], list]:
    text, tokens, ends = "", [], []
    for given_item in items:
        delta = reader.take(WORKER, given_item)
        if delta is not None:
            text += delta.text
            tokens += delta.tokens
            ends += [(delta.finish, delta.stop)] if delta.finish else []
    return text, tokens, ends


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_order_any_repeats_and_any_overlaps_give_each_token_once(data):
    text = data.draw(st.text(alphabet="abc", min_size=1, max_size=20))
    size = len(text)
    starts = data.draw(st.permutations(range(size)))
    items = [item(text, start, data.draw(st.integers(1, size - start)), size) for start in starts]
    items += data.draw(st.lists(st.sampled_from(items), max_size=5))
    out, tokens, ends = read(TokenReader([], TextOptions(decode)), data.draw(st.permutations(items)))
    assert out == text
    assert decode(tokens) == text
    assert ends == [(FinishReason.LENGTH, None)]


@settings(max_examples=300, deadline=None)
@given(
    text=st.text(alphabet="abc", min_size=1, max_size=20),
    cut=st.integers(1, 20),
    stop=st.text(alphabet="abc", min_size=1, max_size=3),
)
def test_a_stop_string_cuts_the_text_wherever_messages_are_cut(text, cut, stop):
    items = [item(text, start, cut, len(text)) for start in range(0, len(text), cut)]
    out, tokens, ends = read(TokenReader([], TextOptions(decode, stop=(stop,))), items)
    found = text.find(stop)
    assert out == (text if found < 0 else text[:found])
    assert ends == ([(FinishReason.LENGTH, None)] if found < 0 else [(FinishReason.STOP, stop)])
    assert len(tokens) == (len(text) if found < 0 else found + len(stop))


def test_stop_strings_wait_for_min_tokens():
    reader = TokenReader([], TextOptions(decode, stop=("a",), min_tokens=3))
    out, _, ends = read(reader, [item("aaaab", start, 1, 5) for start in range(5)])
    assert out == "aaa"
    assert ends == [(FinishReason.STOP, "a")]


def test_the_text_of_a_stop_token_is_shown_only_when_asked_for():
    last = TokenItem(attempt="a", position=0, tokens=(97, 98), finish=FinishReason.STOP, stop_token=98)
    assert TokenReader([], TextOptions(decode)).take(WORKER, last).text == "a"
    shown = TokenReader([], TextOptions(decode, include_stop=True)).take(WORKER, last)
    assert (shown.text, shown.stop) == ("ab", 98)


def test_a_gap_is_known_until_it_closes_or_a_new_attempt_begins():
    reader = TokenReader([], TextOptions(decode))
    assert reader.take(WORKER, item("abc", 1, 1, 9)) is None
    assert reader.gap
    reader.forget_early()
    assert not reader.gap
    assert reader.take(WORKER, item("abc", 0, 1, 9)).text == "a"
    assert reader.next_position == 1


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.integers(0, 30), st.integers(1, 4), max_size=15), st.integers(0, 30))
def test_what_is_missing_is_the_first_position_that_no_item_brought(items, position):
    reader = TokenReader([], TextOptions(decode))
    for start, count in items.items():
        reader.take(WORKER, item("a" * 40, start, count, 99))
    here = {at for start, count in items.items() for at in range(start, start + count)}
    assert reader.missing_from(position) == min(at for at in range(position, 99) if at not in here)


def test_logprobs_and_reports_stay_with_their_tokens():
    reader = TokenReader([], TextOptions(decode))
    marks = tuple(TokenLogprobs(logprob=-float(index)) for index in range(4))
    reader.take(WORKER, item("abcd", 0, 2, 9, logprobs=marks[:2]))
    delta = reader.take(("d", 1), item("abcd", 0, 4, 9, logprobs=marks, served=ServedBy(kv_bytes=7)))
    assert decode(delta.tokens) == "cd"
    assert [mark.logprob for mark in delta.logprobs] == [-2.0, -3.0]
    assert delta.served == [(("d", 1), ServedBy(kv_bytes=7))]
    assert delta.worker == ("d", 1)
