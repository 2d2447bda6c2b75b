"""Stop strings against the plainest possible reference."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.text.stops import StopMatcher

letters = st.text(alphabet="abc", max_size=30)
stop_lists = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), max_size=4)


def reference(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return (text[:end] if include else text[: end - len(longest)]), longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(pieces=st.lists(st.text(alphabet="abc", max_size=5), max_size=12), stops=stop_lists, include=st.booleans())
def test_any_cut_of_the_text_gives_what_the_reference_gives(pieces, stops, include):
    matcher = StopMatcher(stops, include)
    out = ""
    for piece in pieces:
        out += matcher.feed(piece)
        if matcher.matched:
            break
    else:
        out += matcher.flush()
    assert (out, matcher.matched) == reference("".join(pieces), stops, include)


@given(text=letters, stops=stop_lists)
def test_what_is_let_out_never_has_to_be_taken_back(text, stops):
    final, _ = reference(text, stops, include=False)
    matcher = StopMatcher(stops)
    out = ""
    for char in text:
        out += matcher.feed(char)
        assert final.startswith(out)
        if matcher.matched:
            break


def test_text_without_a_possible_match_is_not_delayed():
    matcher = StopMatcher(["STOP"])
    assert matcher.feed("hello S") == "hello "
    assert matcher.feed("ad") == "Sad"


def test_an_unarmed_matcher_lets_everything_pass_and_forgets_it():
    matcher = StopMatcher(["ab"])
    assert matcher.feed("xab", armed=False) == "xab"
    assert matcher.feed("a", armed=False) == "a"
    assert matcher.feed("b") == "b"
    assert matcher.matched is None


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ValueError, match="empty"):
        StopMatcher([""])
