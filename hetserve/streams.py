"""An answer that arrives piece by piece. Iterate to the end, or close it: closing tells the server to stop generating.

Nothing here is retried: chunks that were handed out stay valid, and what goes wrong afterwards raises StreamError or
TimedOut from the iteration. Not safe to iterate from two threads or tasks.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator
from types import TracebackType
from typing import Self

import httpx

from hetserve.errors import StreamError, TimedOut
from hetserve.exchange import Attempts, error_in_stream
from hetserve.parsing import chunk as parse_chunk
from hetserve.parsing import parse_object
from hetserve.sse import EventDecoder
from hetserve.types import Chunk

_DONE = b"[DONE]"


class _Events:
    """Bytes to chunks, and whether the server has said that it is done."""

    def __init__(self, request_id: str | None) -> None:
        self._decoder = EventDecoder()
        self._request_id = request_id
        self.done = False

    def feed(self, data: bytes) -> Iterator[Chunk]:
        """The chunks that `data` completes. Raises StreamError where the server reports one."""
        for event in self._decoder.feed(data):
            if self.done:
                return
            if event == _DONE:
                self.done = True
                return
            body = parse_object(event, "stream chunk")
            error = error_in_stream(body, self._request_id)
            if error is not None:
                raise error
            yield parse_chunk(body)

    def ended(self) -> None:
        """Raises StreamError unless the server had said `[DONE]`."""
        if not self.done:
            raise StreamError("the server ended the stream before [DONE]", request_id=self._request_id)


class Stream:
    """Chunks of one answer, synchronously. `request_id` is the server's name for it."""

    def __init__(self, response: httpx.Response, attempts: Attempts) -> None:
        self._response = response
        self._attempts = attempts
        self.request_id: str | None = response.headers.get("x-request-id")
        self._chunks = self._run()

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
        self._chunks.close()
        self._response.close()

    def _run(self) -> Generator[Chunk, None, None]:
        events = _Events(self.request_id)
        try:
            for data in self._response.iter_bytes():
                yield from events.feed(data)
                if not events.done:
                    self._attempts.remaining_s()
            events.ended()
        except httpx.HTTPError as error:
            if not events.done:
                raise self._attempts.stream_error(error) from error
        finally:
            self._response.close()


class AsyncStream:
    """Chunks of one answer, in asyncio. `request_id` is the server's name for it."""

    def __init__(self, response: httpx.Response, attempts: Attempts) -> None:
        self._response = response
        self._attempts = attempts
        self.request_id: str | None = response.headers.get("x-request-id")
        self._chunks = self._run()

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        left_s = self._attempts.remaining_s()
        if left_s is None:
            return await self._chunks.__anext__()
        try:
            async with asyncio.timeout(left_s):
                return await self._chunks.__anext__()
        except TimeoutError:
            await self.aclose()
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
        await self._chunks.aclose()
        await self._response.aclose()

    async def _run(self) -> AsyncGenerator[Chunk, None]:
        events = _Events(self.request_id)
        try:
            async for data in self._response.aiter_bytes():
                for chunk in events.feed(data):
                    yield chunk
            events.ended()
        except httpx.HTTPError as error:
            if not events.done:
                raise self._attempts.stream_error(error) from error
        finally:
            await self._response.aclose()
