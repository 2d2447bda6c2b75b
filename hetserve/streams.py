"""An answer that arrives piece by piece. Iterate to the end, or close it: closing tells the server to stop generating.

Nothing here is retried: chunks that were handed out stay valid, and what goes wrong afterwards raises StreamError or
TimedOut from the iteration. One thread or task may iterate; another may close, which ends the iteration with StreamError.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

import httpx

from hetserve.errors import InvalidResponse, StreamError, TimedOut
from hetserve.exchange import FAILURES, Attempts, error_in_stream
from hetserve.parsing import chunk as parse_chunk
from hetserve.parsing import parse_object
from hetserve.sse import Event, EventDecoder
from hetserve.types import Chunk

END_S = 1.0
"""How long after `[DONE]` the response may take to end. The connection can be used again if it does."""

_DONE = b"[DONE]"


class _Events:
    """Bytes to chunks, and whether the server has said that it is done. `last_id` is of the last event handed out."""

    def __init__(self, request_id: str | None) -> None:
        self._decoder = EventDecoder()
        self.request_id = request_id
        self.last_id: str | None = None
        self.done = False

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that `data` completes. Raises StreamError where the server reports one."""
        for event in self._decoder.feed(data):
            if event.data == _DONE:
                self.done = True
                return
            body = self._object(event)
            error = error_in_stream(body, self.request_id)
            if error is not None:
                raise error
            chunk = parse_chunk(body)
            self.last_id = event.id or None
            yield chunk

    def ended(self) -> None:
        """Raises StreamError unless the server had said `[DONE]`."""
        if not self.done:
            raise StreamError("the server ended the stream before [DONE]", request_id=self.request_id)

    def _object(self, event: Event) -> dict[str, object]:
        try:
            body = parse_object(event.data, "stream chunk")
        except InvalidResponse:
            if event.kind != "error":
                raise
            body = {"error": event.data[:200].decode(errors="replace")}
        return body if event.kind != "error" or "error" in body else {"error": body}


class Stream:
    """Chunks of one answer, synchronously. `request_id` is the server's name for it."""

    def __init__(self, response: httpx.Response, attempts: Attempts) -> None:
        self._response = response
        self._attempts = attempts
        self.request_id: str | None = response.headers.get("x-request-id")
        self._events = _Events(self.request_id)
        self._chunks = _chunks(response, attempts, self._events)

    @property
    def last_event_id(self) -> str | None:
        """The id of the last chunk handed out, where the server gives its events ids."""
        return self._events.last_id

    def __iter__(self) -> Iterator[Chunk]:
        return self._chunks

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop reading and hang up. Harmless when the stream is over."""
        try:
            self._chunks.close()
        except ValueError:  # another thread is in it
            _hang_up(self._response)
        else:
            self._response.close()


class AsyncStream:
    """Chunks of one answer, in asyncio. `request_id` is the server's name for it."""

    def __init__(self, response: httpx.Response, attempts: Attempts) -> None:
        self._response = response
        self._attempts = attempts
        self.request_id: str | None = response.headers.get("x-request-id")
        self._events = _Events(self.request_id)
        self._chunks = _chunks_async(response, attempts, self._events)

    @property
    def last_event_id(self) -> str | None:
        """The id of the last chunk handed out, where the server gives its events ids."""
        return self._events.last_id

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        try:
            left_s = self._attempts.remaining_s()
        except TimedOut:
            await self.aclose()
            raise
        if left_s is None:
            return await self._chunks.__anext__()
        try:
            async with asyncio.timeout(left_s):
                return await self._chunks.__anext__()
        except TimeoutError:
            await self.aclose()
            if self._events.done:
                raise StopAsyncIteration from None
            self._attempts.remaining_s()
            raise TimedOut("no complete answer within the time allowed", "total") from None

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Stop reading and hang up. Harmless when the stream is over."""
        with suppress(RuntimeError):  # another task is in it, which closing the response wakes
            await self._chunks.aclose()
        await self._response.aclose()


def _chunks(response: httpx.Response, attempts: Attempts, events: _Events) -> Generator[Chunk, None, None]:
    """Knows no `Stream`, so that whoever leaves a loop over one hangs up at once, and not when garbage is collected."""
    try:
        pieces = response.iter_bytes()
        for data in pieces:
            yield from events.feed(data)
            if events.done:
                _read_end(response, pieces)
                return
            attempts.remaining_s()
        events.ended()
    except FAILURES as error:
        if not events.done:
            raise attempts.stream_failure(error, events.request_id) from error
    finally:
        response.close()


def _read_end(response: httpx.Response, pieces: Iterator[bytes]) -> None:
    late = threading.Timer(END_S, _hang_up, [response])
    late.daemon = True
    late.start()
    try:
        for _ in pieces:
            pass
    finally:
        late.cancel()


def _hang_up(response: httpx.Response) -> None:
    """End a read that another thread waits in; closing the socket would not."""
    network = response.extensions.get("network_stream")
    sock = None if network is None else network.get_extra_info("socket")
    if sock is not None and not response.is_closed:
        with suppress(OSError):
            socket.socket.shutdown(sock, socket.SHUT_RDWR)  # past the `shutdown` of a TLS socket, which is not for two threads


async def _chunks_async(response: httpx.Response, attempts: Attempts, events: _Events) -> AsyncGenerator[Chunk, None]:
    try:
        pieces = response.aiter_bytes()
        async for data in pieces:
            for chunk in events.feed(data):
                yield chunk
            if events.done:
                await _read_end_async(pieces)
                return
        events.ended()
    except FAILURES as error:
        if not events.done:
            raise attempts.stream_failure(error, events.request_id) from error
    finally:
        await response.aclose()


async def _read_end_async(pieces: AsyncIterator[bytes]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(END_S):
            async for _ in pieces:
                pass
