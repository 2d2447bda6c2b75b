from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetserve import sse
from hetserve.errors import StreamError
from hetserve.sse import Event, EventDecoder


def decoded(wire: bytes, decoder: EventDecoder | None = None) -> list[Event]:
    return list((decoder or EventDecoder()).feed(wire))


def by_the_book(wire: bytes) -> list[Event]:
    """The standard's algorithm on the whole stream at once."""
    events, data, kind, last_id = [], b"", "", ""
    *lines, _ = re.split(rb"\r\n|\r|\n", wire.removeprefix(b"\xef\xbb\xbf"))
    for line in lines:
        name, colon, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if not line:
            if data:
                events.append(Event(data[:-1], kind or "message", last_id))
            data, kind = b"", ""
        elif colon and not name:
            continue
        elif name == b"data":
            data += value + b"\n"
        elif name == b"event":
            kind = value.decode(errors="replace")
        elif name == b"id" and b"\0" not in value:
            last_id = value.decode(errors="replace")
    return events


PIECES = [
    b"data",
    b"id",
    b"event",
    b"retry",
    b":",
    b": ",
    b"\r",
    b"\n",
    b"\r\n",
    b"\n\n",
    b"7",
    b"a",
    b"\0",
    b"\xef\xbb\xbf",
    b"\xff",
]


@given(wire=st.lists(st.sampled_from(PIECES) | st.binary(max_size=3), max_size=60).map(b"".join), data=st.data())
def test_any_bytes_in_any_chunks_give_the_standards_events(wire: bytes, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 5), min_size=len(wire), max_size=len(wire)))
    places = [0, *itertools.takewhile(lambda place: place < len(wire), itertools.accumulate(sizes)), len(wire)]
    decoder = EventDecoder()
    got = [event for a, b in itertools.pairwise(places) for event in decoder.feed(wire[a:b])]
    assert got == by_the_book(wire)


@pytest.mark.parametrize("ends", ["\n", "\r\n", "\r"])
def test_events_survive_byte_by_byte(ends: str) -> None:
    wire = f"data: a{ends}id: 1{ends}{ends}: ping{ends}data: b\u2028{ends}{ends}".encode()
    decoder = EventDecoder()
    got = [event for at in range(len(wire)) for event in decoder.feed(wire[at : at + 1])]
    assert got == [Event(b"a", id="1"), Event("b\u2028".encode(), id="1")]


def test_a_line_feed_that_comes_alone_ends_the_line_before_it_and_no_other() -> None:
    decoder = EventDecoder()
    assert [list(decoder.feed(piece)) for piece in (b"data: a\r", b"\n", b"\n")] == [[], [], [Event(b"a")]]


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
    assert [event.data.decode() for event in got] == events


def test_comments_are_dropped_and_lines_of_one_event_joined() -> None:
    assert decoded(b": ping\n\nevent: x\nid: 3\nfoo: bar\ndata: a\ndata:b\ndata\n\n") == [Event(b"a\nb\n", "x", "3")]


def test_a_byte_order_mark_opens_no_line() -> None:
    decoder = EventDecoder()
    got = [event for piece in (b"\xef", b"\xbb\xbfdata: a\n\n", b"\xef\xbb\xbfdata: b\n\n") for event in decoder.feed(piece)]
    assert got == [Event(b"a")]


def test_the_last_id_stays_until_another_is_set_and_counts_once_its_event_is_whole() -> None:
    decoder = EventDecoder()
    assert [event.id for event in decoded(b"data: a\n\nid: 1\ndata: b\n\ndata: c\n\nid\ndata: d\n\n", decoder)] == [
        "",
        "1",
        "1",
        "",
    ]
    assert decoded(b"id: 7\n\nid: \x008\n\nid: 9\n", decoder) == []
    assert decoder.last_event_id == "7"


def test_how_long_to_wait_before_coming_back_is_kept_where_it_is_a_number() -> None:
    decoder = EventDecoder()
    assert decoder.retry_ms is None
    decoded(b"retry: 1500\nretry: soon\nretry: -1\nretry: " + b"9" * 5000 + b"\n", decoder)
    assert decoder.retry_ms == 1500


def test_an_event_without_its_blank_line_is_not_handed_out() -> None:
    decoder = EventDecoder()
    assert decoded(b"data: a\n", decoder) == []
    assert decoded(b"\n", decoder) == [Event(b"a")]


@pytest.mark.parametrize("piece", [b"data: 0123456789\n", b"0123456789"])
def test_an_endless_event_is_refused_after_those_before_it(monkeypatch: pytest.MonkeyPatch, piece: bytes) -> None:
    monkeypatch.setattr(sse, "MAX_EVENT_BYTES", 100)
    decoder = EventDecoder()
    decoded(piece * 9, decoder)
    rest = decoder.feed(b"\n\ndata: a\n\n" + piece * 12)
    assert next(rest).data
    with pytest.raises(StreamError, match="more than"):
        list(rest)
