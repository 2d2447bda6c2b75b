"""Server-sent events, taken apart: bytes in, `data` payloads out (WHATWG HTML, section 9.2).

Works on bytes and splits lines at CR and LF only: a chunk may end inside a character, and JSON text may hold U+2028, which
`str.splitlines` would take for the end of a line.
"""

from __future__ import annotations

from hetserve.errors import StreamError

MAX_EVENT_BYTES = 16 << 20


class EventDecoder:
    """Feed it what arrives; it keeps what is not yet whole. Comments and fields other than `data` are dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._after_cr = False  # a line feed that opens the next chunk belongs to the line that is already over
        self._data: list[bytes] = []
        self._data_bytes = 0

    def feed(self, chunk: bytes) -> list[bytes]:
        """Payloads of the events that `chunk` completes. Raises StreamError on an event over `MAX_EVENT_BYTES`."""
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        if chunk:
            self._after_cr = chunk.endswith(b"\r")
        lines = (self._rest + chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")).split(b"\n")
        self._rest = lines.pop()
        events = [event for line in lines if (event := self._line(line)) is not None]
        if len(self._rest) + self._data_bytes > MAX_EVENT_BYTES:
            raise StreamError(f"the server sent an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def _line(self, line: bytes) -> bytes | None:
        if not line:
            if not self._data:
                return None
            event = b"\n".join(self._data)
            self._data, self._data_bytes = [], 0
            return event
        field, _, value = line.partition(b":")
        if field == b"data":
            value = value.removeprefix(b" ")
            self._data.append(value)
            self._data_bytes += len(value) + 1
        return None
