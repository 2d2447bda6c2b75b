"""Writes a started request's answer to its client: collected into one body, or streamed as server-sent events.

Both watch for the client hanging up, and both close their generations on every way out, so that nobody computes for a
client that is gone. Streaming sends bytes straight through ASGI, one send per wake-up of the inbox.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from core.errors import HetServeError
from gateway.http.errors import encode_error
from gateway.protocol.answers import Answer, Choice, usage_of
from gateway.serving.generation import Generation
from gateway.serving.inbox import ClientGone, Inbox
from gateway.serving.intake import Intake
from gateway.serving.metrics import Metrics
from gateway.text.token_reader import Delta

DONE = b"data: [DONE]\n\n"
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


@dataclass(slots=True)
class Call:
    """One HTTP request's generations and what is needed to answer it.

    `write_timeout_s` bounds the whole answer, so that a client that stops reading cannot hold it forever. `metrics` count the
    errors that no handler sees because the answer has begun.
    """

    intake: Intake
    generations: list[Generation]
    inbox: Inbox
    choices: list[Choice]
    answer: Answer
    with_usage: bool
    traced: bool
    write_timeout_s: float
    metrics: Metrics
    closed: bool = False

    @property
    def open(self) -> int:
        return sum(choice.finish is None for choice in self.choices)

    def usage(self) -> dict[str, Any]:
        prompts = self._prompts()
        return usage_of(
            sum(tokens for tokens, _ in prompts),
            sum(len(generation.entry.tokens) for generation in self.generations),
            sum(cached for _, cached in prompts),
        )

    def _prompts(self) -> list[tuple[int, int]]:
        """Tokens of each prompt, and how many of them were cached. A prompt counts once, whatever `n`."""
        prompts: dict[int, tuple[int, int]] = {}
        for choice, generation in zip(self.choices, self.generations, strict=True):
            known = prompts.get(id(choice.prompt), (0, 0))[1]
            prompts[id(choice.prompt)] = (len(choice.prompt), max(known, generation.entry.cached_tokens))
        return list(prompts.values())

    def trace(self) -> Any:
        """Where it was served, for whoever asked with `x-hetserve-trace`; a list when there are several generations."""
        if not self.traced:
            return None
        summaries = [generation.entry.summary() for generation in self.generations]
        return summaries[0] if len(summaries) == 1 else summaries

    def close(self) -> None:
        """Nobody waits for the answer any more, or it is whole. Idempotent."""
        self.intake.close(self.generations)
        if not self.closed:
            self.closed = True
            self.metrics.cached(sum(cached for _, cached in self._prompts()))


@asynccontextmanager
async def watching(receive: Receive, call: Call) -> AsyncIterator[None]:
    """Fail the call's inbox as soon as the client hangs up; close its generations on the way out."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        call.inbox.fail(ClientGone())
        call.close()

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()
        call.close()


async def collect(call: Call, receive: Receive) -> bytes:
    """The whole answer.

    Raises:
        HetServeError: a generation failed for good.
        ClientGone: nobody waits for the answer.
    """
    async with watching(receive, call):
        while call.open:
            for index, delta in await call.inbox.get():
                call.choices[index].add(delta)
        return call.answer.whole(call.choices, call.usage(), call.trace())


class EventStream(Response):
    """Streams a call. Nothing is sent before something was generated, so that an error until then is an ordinary answer, with
    its status and `Retry-After`. Errors after that become an event and end the stream (openai's clients raise on it)."""

    def __init__(self, call: Call, headers: dict[str, str]) -> None:
        super().__init__()
        self._call = call
        self._head = STREAM_HEADERS + [(name.encode(), value.encode()) for name, value in headers.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises HetServeError when the call failed before its first delta; the response has not begun then."""
        async with watching(receive, self._call):
            try:
                async with asyncio.timeout(self._call.write_timeout_s):
                    await self._stream(send)
            except ClientGone:
                return
            except TimeoutError:  # it stopped reading: leaving the response unfinished makes the server hang up
                return

    async def _stream(self, send: Send) -> None:
        call = self._call
        items = await call.inbox.get()
        await send({"type": "http.response.start", "status": 200, "headers": self._head})
        try:
            while True:
                data = self._chunks(items)
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                if not call.open:
                    break
                items = await call.inbox.get()
            last = b""
            if call.with_usage or call.traced:
                last = call.answer.last_chunk(call.usage() if call.with_usage else None, call.trace())
            last += DONE
        except HetServeError as error:
            call.metrics.refused(error.code)
            last = b"data: " + encode_error(error) + b"\n\n"
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _chunks(self, items: Sequence[tuple[int, Delta]]) -> bytes:
        call = self._call
        if len(items) == 1:
            index, delta = items[0]
            choice = call.choices[index]
            choice.finish = delta.finish
            return call.answer.chunk(choice, delta)
        parts = []
        for index, delta in items:
            choice = call.choices[index]
            choice.finish = delta.finish
            parts.append(call.answer.chunk(choice, delta))
        return b"".join(parts)
