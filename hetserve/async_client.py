"""`AsyncClient`: `hetserve.client.Client` in asyncio, call for call.

    async with AsyncClient("http://127.0.0.1:8000") as client:
        async with await client.stream_chat([{"role": "user", "content": "Hello"}]) as stream:
            async for chunk in stream:
                print(chunk.text, end="")

Cancelling a call hangs up, and the server stops generating.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from hetserve import exchange, parsing
from hetserve.exchange import Answer, Attempts, Call, Timeouts
from hetserve.retries import Retries
from hetserve.streams import AsyncStream
from hetserve.types import (
    ChatOptions,
    Completion,
    CompletionOptions,
    Health,
    Instance,
    Message,
    Model,
    Prompt,
    Tokenization,
    Trace,
)


class AsyncClient:
    """A pool of connections to one server, for one event loop.

    Args:
        url: the server's root, with or without `/v1`; None takes `HETSERVE_URL`, else port 8000 of this machine.
        api_key: None takes `HETSERVE_API_KEY`, else sends no key.
        timeouts: for every call; `timeouts=` of a call wins.
        retries: of calls that got no answer, or one that says to come back.
        transport: in place of the network.
        sleep, draw, clock: waiting, jitter and time, for tests.

    Every call raises `APIError`s; see the tree in `hetserve.errors`.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeouts: Timeouts | None = None,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        draw: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._timeouts = timeouts or Timeouts()
        self._retries = retries or Retries()
        self._sleep = sleep
        self._draw = draw
        self._clock = clock
        self._model: str | None = None
        root = exchange.base_url(url)
        if transport is None and exchange.on_loopback(root):
            transport = httpx.AsyncHTTPTransport(limits=exchange.LIMITS)  # past any proxy that the environment names
        self._http = httpx.AsyncClient(
            base_url=root, headers=exchange.default_headers(api_key), transport=transport, limits=exchange.LIMITS
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close the pool; streams still open end with an error."""
        await self._http.aclose()

    async def completions(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        trace: bool = False,
        timeouts: Timeouts | None = None,
        **options: Unpack[CompletionOptions],
    ) -> Completion:
        """Continue text, token ids, or a batch of either. `model` None is the first that the server lists."""
        return await self._generate("v1/completions", {"prompt": prompt}, model, trace, timeouts, options)

    async def stream_completions(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        trace: bool = False,
        timeouts: Timeouts | None = None,
        **options: Unpack[CompletionOptions],
    ) -> AsyncStream:
        """`completions`, piece by piece. Returns once the server has begun to answer."""
        return await self._stream("v1/completions", {"prompt": prompt}, model, trace, timeouts, options)

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        trace: bool = False,
        timeouts: Timeouts | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion:
        """Answer a conversation, through the model's own chat template."""
        return await self._generate("v1/chat/completions", {"messages": messages}, model, trace, timeouts, options)

    async def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        trace: bool = False,
        timeouts: Timeouts | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncStream:
        """`chat`, piece by piece. Returns once the server has begun to answer."""
        return await self._stream("v1/chat/completions", {"messages": messages}, model, trace, timeouts, options)

    async def models(self) -> tuple[Model, ...]:
        """What the server serves."""
        return parsing.models(await self._get("v1/models", "list of models"))

    async def tokenize(
        self, text: str | Sequence[Message], *, model: str | None = None, add_special_tokens: bool = True
    ) -> Tokenization:
        """Token ids of a text, or of a conversation in the model's chat template."""
        fields = {"prompt": text, "add_special_tokens": add_special_tokens} if isinstance(text, str) else {"messages": text}
        body = {"model": model or await self._default_model(), **fields}
        return parsing.tokenization(await self._json(Call("POST", "tokenize", body), "tokenization"))

    async def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        body = {"model": model or await self._default_model(), "tokens": list(tokens)}
        return parsing.detokenization(await self._json(Call("POST", "detokenize", body), "detokenization"))

    async def health(self) -> Health:
        """Whether the server can serve now. Not retried on 503, which is an answer."""
        return exchange.health(await self._send(Call("GET", "health", retry_statuses=False), None))

    async def instances(self) -> tuple[Instance, ...]:
        """The engines behind the server (HetServe alone)."""
        return parsing.instances(await self._get("debug/instances", "list of instances"))

    async def requests(self) -> tuple[Trace, ...]:
        """Generations that finished lately and how they were served, newest first (HetServe alone)."""
        return parsing.requests(await self._get("debug/requests", "list of requests"))

    async def running(self) -> tuple[Trace, ...]:
        """Generations that run now, and who serves them so far (HetServe alone)."""
        return parsing.running(await self._get("debug/requests", "list of requests"))

    async def _default_model(self) -> str:
        if self._model is None:
            self._model = exchange.only_model(tuple(model.id for model in await self.models()))
        return self._model

    async def _generate(
        self,
        path: str,
        fields: dict[str, Any],
        model: str | None,
        trace: bool,
        timeouts: Timeouts | None,
        options: CompletionOptions | ChatOptions,
    ) -> Completion:
        body = exchange.generation_body(model or await self._default_model(), fields, options, stream=False)
        answer = await self._send(Call("POST", path, body, trace), timeouts)
        exchange.raise_for_status(answer)
        return parsing.completion(parsing.parse_object(answer.content, "completion"), answer.request_id)

    async def _stream(
        self,
        path: str,
        fields: dict[str, Any],
        model: str | None,
        trace: bool,
        timeouts: Timeouts | None,
        options: CompletionOptions | ChatOptions,
    ) -> AsyncStream:
        body = exchange.generation_body(model or await self._default_model(), fields, options, stream=True)
        call = Call("POST", path, body, trace)
        attempts = self._attempts(call, timeouts)
        response = await self._open(call, attempts, stream=True)
        if isinstance(response, httpx.Response):
            return AsyncStream(response, attempts)
        exchange.raise_for_status(response)
        raise exchange.not_a_stream(response)

    async def _get(self, path: str, what: str) -> parsing.Json:
        return await self._json(Call("GET", path), what)

    async def _json(self, call: Call, what: str) -> parsing.Json:
        answer = await self._send(call, None)
        exchange.raise_for_status(answer)
        return parsing.parse_object(answer.content, what)

    def _attempts(self, call: Call, timeouts: Timeouts | None) -> Attempts:
        return Attempts(call, self._retries, timeouts or self._timeouts, self._clock, self._draw)

    async def _send(self, call: Call, timeouts: Timeouts | None) -> Answer:
        answer = await self._open(call, self._attempts(call, timeouts), stream=False)
        assert isinstance(answer, Answer)
        return answer

    async def _open(self, call: Call, attempts: Attempts, stream: bool) -> Answer | httpx.Response:
        """The answer to take, read whole; or, with `stream`, the open response where an event stream has begun."""
        while True:
            try:
                response = await self._http.send(attempts.request(self._http), stream=True)
                if exchange.is_event_stream(response):
                    if stream:
                        return response
                    await response.aclose()
                    raise exchange.not_an_answer()
                answer = await self._read(response, attempts)
                wait_s = attempts.wants_retry(answer)
                if wait_s is None:
                    return answer
            except exchange.FAILURES as error:
                wait_s = attempts.after(error)
            await self._sleep(wait_s)

    async def _read(self, response: httpx.Response, attempts: Attempts) -> Answer:
        body = bytearray()
        try:
            async for data in response.aiter_bytes():
                attempts.remaining_s()
                body += data
                exchange.check_size(body)
        finally:
            await response.aclose()
        return exchange.answer(response, bytes(body))
