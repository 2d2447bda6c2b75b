"""One client's connection: uvicorn's HTTP/1.1 protocol with bounds on what a client may cost before a handler sees it.

Bounded are the bytes of a head, the time from a request's first byte (or the connection's beginning) to its last, and the
number of connections. Whoever exceeds one is answered in OpenAI's shape and hung up on. A body that a handler is reading is
timed by the handler (`gateway.http.body.read_body`), which has the better answer; here only one that nobody reads any more.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from core.errors import HetServeError, ReadTimeout, Unavailable
from gateway.http.errors import body_of, error_body, headers_of, should_retry
from gateway.protocol.answers import encode_json

MAX_HEAD_BYTES = 64 * 1024
HEADER_OVERHEAD_BYTES = 32
"""What a header costs beside its text, as HTTP/2 counts it."""


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    read_timeout_s: float = 60.0
    max_connections: int = 8192


class Connection(HttpToolsProtocol):
    """`limits` are the same for all connections of a server."""

    def __init__(self, *args: Any, limits: ConnectionLimits, **options: Any) -> None:
        super().__init__(*args, **options)
        self._limits = limits
        self._head_bytes = 0
        self._in_head = True
        self._reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self._refuse(Unavailable("too many connections"))
        else:
            self._time_reading()

    @property
    def answering(self) -> bool:
        """Whether an answer is being made, or some of one waits for a client that reads slowly."""
        making = self.cycle is not None and not self.cycle.response_complete
        return making or self.transport.get_write_buffer_size() > 0

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timing()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        if self._reading is None:
            self._time_reading()
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._stop_timing()
        super().on_message_complete()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._head_bytes += len(name) + len(value) + HEADER_OVERHEAD_BYTES
        if self._head_bytes > MAX_HEAD_BYTES:
            raise ValueError("headers too large")
        super().on_header(name, value)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if was_in_head and self._in_head and self.parser is not None and not self.transport.is_closing():
            # Parts of an unfinished header never reach `on_header`: count what arrives.
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self.send_400_response("headers too large")

    def send_400_response(self, msg: str) -> None:
        self._hang_up(400, error_body(400, msg, "malformed_http"), should_retry(False))

    def _time_reading(self) -> None:
        self._reading = self.loop.call_later(self._limits.read_timeout_s, self._read_too_long)

    def _stop_timing(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _read_too_long(self) -> None:
        self._reading = None
        if self.cycle is not None and not self.cycle.response_complete:
            self._time_reading()  # a handler is at work: it reads this body, or this is pipelined behind its request
        elif self._in_head:
            self._refuse(ReadTimeout(f"the request did not arrive within {self._limits.read_timeout_s:g} s"))
        else:
            self.transport.close()

    def _refuse(self, error: HetServeError) -> None:
        self._hang_up(error.status, body_of(error), headers_of(error))

    def _hang_up(self, status: int, content: dict[str, Any], extra: dict[str, str]) -> None:
        if self.transport.is_closing():
            return
        body = encode_json(content)
        headers = {**extra, "content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        self.transport.write(STATUS_LINE[status] + head.encode() + b"\r\n" + body)
        self.transport.close()
