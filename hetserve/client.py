"""`Client`: HetServe from ordinary code.

    with Client("http://127.0.0.1:8000") as client:
        print(client.completions("Once upon a time", max_tokens=32).text)
        with client.stream_chat([{"role": "user", "content": "Hello"}]) as stream:
            for chunk in stream:
                print(chunk.text, end="")

Connections are pooled; one client may be used from many threads. `AsyncClient` is the same in asyncio. Errors are those of
`hetserve.errors`, and nothing of httpx gets out. To test offline, pass `transport=httpx.MockTransport(...)`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import httpx

from hetserve import exchange, parsing
from hetserve.exchange import Answer, Attempts, Call, Timeouts
from hetserve.retries import Retries
from hetserve.streams import Stream
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


class Client:
    """A pool of connections to one server.

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
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
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
            transport = httpx.HTTPTransport(limits=exchange.LIMITS)  # past any proxy that the environment names
        self._http = httpx.Client(
            base_url=root, headers=exchange.default_headers(api_key), transport=transport, limits=exchange.LIMITS
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the pool; streams still open end with an error."""
        self._http.close()

    def completions(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        trace: bool = False,
        timeouts: Timeouts | None = None,
        **options: Unpack[CompletionOptions],
    ) -> Completion:
        """Continue text, token ids, or a batch of either. `model` None is the first that the server lists."""
        return self._generate("v1/completions", {"prompt": prompt}, model, trace, timeouts, options)

    def stream_completions(
        self,
        prompt: Prompt,
        *,
        model: str | None = None,
        trace: bool = False,
        timeouts: Timeouts | None = None,
        **options: Unpack[CompletionOptions],
    ) -> Stream:
        """`completions`, piece by piece. Returns once the server has begun to answer."""
        return self._stream("v1/completions", {"prompt": prompt}, model, trace, timeouts, options)

    def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        trace: bool = False,
        timeouts: Timeouts | None = None,
        **options: Unpack[ChatOptions],
    ) -> Completion:
        """Answer a conversation, through the model's own chat template."""
        return self._generate("v1/chat/completions", {"messages": messages}, model, trace, timeouts, options)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        model: str | None = None,
        trace: bool = False,
        timeouts: Timeouts | None = None,
        **options: Unpack[ChatOptions],
    ) -> Stream:
        """`chat`, piece by piece. Returns once the server has begun to answer."""
        return self._stream("v1/chat/completions", {"messages": messages}, model, trace, timeouts, options)

    def models(self) -> tuple[Model, ...]:
        """What the server serves."""
        return parsing.models(self._get("v1/models", "list of models"))

    def tokenize(
        self, text: str | Sequence[Message], *, model: str | None = None, add_special_tokens: bool = True
    ) -> Tokenization:
        """Token ids of a text, or of a conversation in the model's chat template."""
        fields = {"prompt": text, "add_special_tokens": add_special_tokens} if isinstance(text, str) else {"messages": text}
        body = {"model": model or self._default_model(), **fields}
        return parsing.tokenization(self._json(Call("POST", "tokenize", body), "tokenization"))

    def detokenize(self, tokens: Sequence[int], *, model: str | None = None) -> str:
        """The text of token ids."""
        body = {"model": model or self._default_model(), "tokens": list(tokens)}
        return parsing.detokenization(self._json(Call("POST", "detokenize", body), "detokenization"))

    def health(self) -> Health:
        """Whether the server can serve now. Not retried on 503, which is an answer."""
        return exchange.health(self._send(Call("GET", "health", retry_statuses=False), None))

    def instances(self) -> tuple[Instance, ...]:
        """The engines behind the server (HetServe alone)."""
        return parsing.instances(self._get("debug/instances", "list of instances"))

    def requests(self) -> tuple[Trace, ...]:
        """Generations that finished lately and how they were served, newest first (HetServe alone)."""
        return parsing.requests(self._get("debug/requests", "list of requests"))

    def running(self) -> tuple[Trace, ...]:
        """Generations that run now, and who serves them so far (HetServe alone)."""
        return parsing.running(self._get("debug/requests", "list of requests"))

    def _default_model(self) -> str:
        if self._model is None:
            self._model = exchange.only_model(tuple(model.id for model in self.models()))
        return self._model

    def _generate(
        self,
        path: str,
        fields: dict[str, Any],
        model: str | None,
        trace: bool,
        timeouts: Timeouts | None,
        options: CompletionOptions | ChatOptions,
    ) -> Completion:
        body = exchange.generation_body(model or self._default_model(), fields, options, stream=False)
        answer = self._send(Call("POST", path, body, trace), timeouts)
        exchange.raise_for_status(answer)
        return parsing.completion(parsing.parse_object(answer.content, "completion"), answer.request_id)

    def _stream(
        self,
        path: str,
        fields: dict[str, Any],
        model: str | None,
        trace: bool,
        timeouts: Timeouts | None,
        options: CompletionOptions | ChatOptions,
    ) -> Stream:
        body = exchange.generation_body(model or self._default_model(), fields, options, stream=True)
        call = Call("POST", path, body, trace)
        attempts = self._attempts(call, timeouts)
        response = self._open(call, attempts, stream=True)
        if isinstance(response, httpx.Response):
            return Stream(response, attempts)
        exchange.raise_for_status(response)
        raise exchange.not_a_stream(response)

    def _get(self, path: str, what: str) -> parsing.Json:
        return self._json(Call("GET", path), what)

    def _json(self, call: Call, what: str) -> parsing.Json:
        answer = self._send(call, None)
        exchange.raise_for_status(answer)
        return parsing.parse_object(answer.content, what)

    def _attempts(self, call: Call, timeouts: Timeouts | None) -> Attempts:
        return Attempts(call, self._retries, timeouts or self._timeouts, self._clock, self._draw)

    def _send(self, call: Call, timeouts: Timeouts | None) -> Answer:
        answer = self._open(call, self._attempts(call, timeouts), stream=False)
        assert isinstance(answer, Answer)
        return answer

    def _open(self, call: Call, attempts: Attempts, stream: bool) -> Answer | httpx.Response:
        """The answer to take, read whole; or, with `stream`, the open response where an event stream has begun."""
        while True:
            try:
                response = self._http.send(attempts.request(self._http), stream=True)
                if exchange.is_event_stream(response):
                    if stream:
                        return response
                    response.close()
                    raise exchange.not_an_answer()
                answer = self._read(response, attempts)
                wait_s = attempts.wants_retry(answer)
                if wait_s is None:
                    return answer
            except exchange.FAILURES as error:
                wait_s = attempts.after(error)
            self._sleep(wait_s)

    def _read(self, response: httpx.Response, attempts: Attempts) -> Answer:
        body = bytearray()
        try:
            for data in response.iter_bytes():
                attempts.remaining_s()
                body += data
                exchange.check_size(body)
        finally:
            response.close()
        return exchange.answer(response, bytes(body))
