from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetserve import sse
from hetserve.errors import StreamError
from hetserve.sse import EventDecoder


@given(
    events=st.lists(st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"])), max_size=6),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 400), max_size=12),
)
def test_events_survive_any_cutting_into_chunks(events: list[str], ends: str, cuts: list[int]) -> None:
    wire = "".join(f"data: {event}{ends}{ends}" for event in events).encode()
    places = sorted({0, len(wire), *(min(cut, len(wire)) for cut in cuts)})
    decoder = EventDecoder()
    got = [event for a, b in itertools.pairwise(places) for event in decoder.feed(wire[a:b])]
    assert [event.decode() for event in got] == events


def test_comments_and_other_fields_are_dropped_and_lines_of_one_event_joined() -> None:
    assert EventDecoder().feed(b": ping\n\nevent: x\nid: 3\ndata: a\ndata:b\n\n") == [b"a\nb"]


def test_an_event_without_its_blank_line_is_not_handed_out() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\n") == [b"a"]


def test_an_endless_event_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    decoder = EventDecoder()
    decoder.feed(b"data: 0123456789\n" * 9)
    with pytest.raises(StreamError, match="more than"):
        decoder.feed(b"data: 0123456789\n")
