"""Server-sent events, taken apart: bytes in, events out (WHATWG HTML, section 9.2).

Works on bytes and splits lines at CR and LF only: a chunk may end inside a character, and JSON text may hold U+2028, which
`str.splitlines` would take for the end of a line.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from hetserve.errors import StreamError

MAX_EVENT_BYTES = 16 << 20

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_MAX_RETRY_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Event:
    """`data` of several lines is joined by line feeds. `id` is the last one that the stream had set, empty before any."""

    data: bytes
    kind: str = "message"
    id: str = ""


class EventDecoder:
    """Feed it what arrives; it keeps what is not yet whole. Comments and unknown fields are dropped.

    `last_event_id` and `retry_ms` are what a client that comes back shall send, and how long it shall wait before; the first
    empty, the second None, until the server says.
    """

    def __init__(self) -> None:
        self.last_event_id = ""
        self.retry_ms: int | None = None
        self._id = ""  # counts once its event is whole
        self._kind = ""
        self._data: list[bytes] = []
        self._data_bytes = 0
        self._rest: list[bytes] = []  # pieces of a line, put together once: a line may come in a thousand chunks
        self._rest_bytes = 0
        self._after_cr = False  # a line feed that opens the next chunk belongs to the line that is already over
        self._first = True

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """The events that `chunk` completes; take them all. Raises StreamError on an event over `MAX_EVENT_BYTES`."""
        if not chunk:
            return
        fresh = chunk[1:] if self._after_cr and chunk.startswith(b"\n") else chunk
        self._after_cr = chunk.endswith(b"\r")
        *lines, rest = fresh.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")
        for line in lines:
            event = self._line(self._whole(line))
            if event is not None:
                yield event
        self._rest.append(rest)
        self._rest_bytes += len(rest)
        if self._rest_bytes + self._data_bytes > MAX_EVENT_BYTES:
            raise StreamError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")

    def _whole(self, end: bytes) -> bytes:
        line = b"".join((*self._rest, end))
        self._rest, self._rest_bytes = [], 0
        if self._first:
            self._first = False
            return line.removeprefix(_BYTE_ORDER_MARK)
        return line

    def _line(self, line: bytes) -> Event | None:
        if not line:
            return self._dispatch()
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if field == b"data":
            self._data.append(value)
            self._data_bytes += len(value) + 1
        elif field == b"event":
            self._kind = value.decode(errors="replace")
        elif field == b"id" and b"\0" not in value:
            self._id = value.decode(errors="replace")
        elif field == b"retry" and value.isdigit() and len(value) <= _MAX_RETRY_DIGITS:
            self.retry_ms = int(value)
        return None

    def _dispatch(self) -> Event | None:
        self.last_event_id = self._id
        data, kind = self._data, self._kind
        self._data, self._data_bytes, self._kind = [], 0, ""
        return Event(b"\n".join(data), kind or "message", self._id) if data else None
