"""What both clients share, without I/O: how a call becomes an HTTP request, and what an answer or a failure means.

`Client` and `AsyncClient` send and wait; every decision is here or in `hetserve.retries`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

from hetserve._version import __version__
from hetserve.errors import (
    APIError,
    ConnectionFailed,
    InvalidArgument,
    InvalidResponse,
    StreamError,
    TimedOut,
    status_error_type,
)
from hetserve.parsing import Json, parse_object
from hetserve.retries import Retries, may_retry, retry_after_s
from hetserve.types import Health

DEFAULT_URL = "http://127.0.0.1:8000"

KEEP_ALIVE_S = 15.0
"""How long an idle connection is kept for the next call: half of what the server keeps it. Were the two the same, calls would go
out on connections that the server is about to close, and would have to be sent again."""

LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=KEEP_ALIVE_S)

MAX_ANSWER_BYTES = 1 << 30

FAILURES = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError)
"""What sending and reading may raise. UnicodeError: httpx looks at where a redirect leads even if nobody follows it, and not
every host there can be a name."""


@dataclass(frozen=True)
class Timeouts:
    """Seconds; None waits for ever.

    `connect_s` is for reaching the server, `read_s` for each silence of its, `total_s` for the whole call, retries
    included. `total_s` is looked at whenever bytes arrive: a server that says nothing at all is given up after `read_s`
    or the rest of `total_s`, whichever is less.
    """

    connect_s: float | None = 5.0
    read_s: float | None = 600.0
    total_s: float | None = None

    def httpx(self, remaining_s: float | None) -> httpx.Timeout:
        """As httpx wants it, with at most `remaining_s` for any phase."""
        return httpx.Timeout(
            connect=_least(self.connect_s, remaining_s),
            read=_least(self.read_s, remaining_s),
            write=_least(self.read_s, remaining_s),
            pool=_least(self.connect_s, remaining_s),
        )


@dataclass(frozen=True)
class Call:
    """One request to the API."""

    method: str
    path: str
    body: Mapping[str, Any] | None = None
    trace: bool = False
    retry_statuses: bool = True

    def build(self, client: httpx.Client | httpx.AsyncClient, timeout: httpx.Timeout) -> httpx.Request:
        headers = {"x-hetserve-trace": "1"} if self.trace else {}
        if self.body is None:
            return client.build_request(self.method, self.path, headers=headers, timeout=timeout)
        try:
            content = json.dumps(self.body, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidArgument(f"{self.method} {self.path}: the request cannot be JSON: {error}") from error
        headers["content-type"] = "application/json"
        return client.build_request(self.method, self.path, content=content, headers=headers, timeout=timeout)


@dataclass(frozen=True)
class Answer:
    """An answer that was read whole."""

    status: int
    reason: str
    headers: Mapping[str, str]
    content: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300

    @property
    def request_id(self) -> str | None:
        return self.headers.get("x-request-id")


class Attempts:
    """The tries of one call: after each, how long to wait before the next, or which error it was.

    `clock` gives seconds on a monotonic clock, `draw` uniform numbers from [0, 1).
    """

    def __init__(self, call: Call, retries: Retries, timeouts: Timeouts, clock: Callable[[], float], draw: Callable[[], float]):
        self._call = call
        self._retries = retries
        self._timeouts = timeouts
        self._clock = clock
        self._draw = draw
        self._tried = 0
        self._name = f"{call.method} {call.path}"
        self._deadline_s = None if timeouts.total_s is None else clock() + timeouts.total_s

    def remaining_s(self) -> float | None:
        """Seconds left of `total_s`. Raises TimedOut when there are none."""
        if self._deadline_s is None:
            return None
        left_s = self._deadline_s - self._clock()
        if left_s <= 0:
            raise TimedOut(f"{self._name}: no complete answer within {self._timeouts.total_s:g} s", "total")
        return left_s

    def request(self, client: httpx.Client | httpx.AsyncClient) -> httpx.Request:
        """The next try. Raises InvalidArgument, ConnectionFailed if the client was closed, TimedOut if the time is up."""
        if client.is_closed:
            raise ConnectionFailed(f"{self._name}: the client is closed")
        self._tried += 1
        request = self._call.build(client, self._timeouts.httpx(self.remaining_s()))
        self._name = f"{request.method} {request.url}"
        return request

    def wants_retry(self, answer: Answer) -> float | None:
        """Seconds to wait before trying again, or None to take this answer as it is."""
        if answer.ok or not self._call.retry_statuses or not may_retry(answer.status, answer.headers):
            return None
        return self._wait(retry_after_s(answer.headers))

    def after(self, error: Exception) -> float:
        """Seconds to wait before trying again after one of `FAILURES`. Raises its counterpart when there is no point."""
        wait_s = self._wait(None) if isinstance(error, httpx.TransportError) else None
        if wait_s is None:
            raise self.failure(error) from error
        return wait_s

    def failure(self, error: Exception) -> APIError:
        """What one of `FAILURES` means before an answer has begun."""
        if isinstance(error, httpx.ConnectTimeout | httpx.PoolTimeout):
            return TimedOut(f"{self._name}: no connection within {_seconds(self._timeouts.connect_s)}", "connect")
        if isinstance(error, httpx.TimeoutException):
            self.remaining_s()
            return TimedOut(f"{self._name}: no answer within {_seconds(self._timeouts.read_s)}", "read")
        kind = ConnectionFailed if isinstance(error, httpx.TransportError) else InvalidResponse
        return kind(f"{self._name}: {str(error) or type(error).__name__}")

    def stream_failure(self, error: Exception, request_id: str | None) -> APIError:
        """What one of `FAILURES` means once a stream has begun."""
        if isinstance(error, httpx.TimeoutException):
            return self.failure(error)
        message = f"{self._name}: the stream broke off: {str(error) or type(error).__name__}"
        return StreamError(message, request_id=request_id)

    def _wait(self, told_s: float | None) -> float | None:
        wait_s = self._retries.delay_s(self._tried, told_s, self._draw())
        if wait_s is None or self._deadline_s is None:
            return wait_s
        return wait_s if self._clock() + wait_s < self._deadline_s else None


def base_url(url: str | None) -> httpx.URL:
    """The server's root: `url`, else `HETSERVE_URL`, else the default port here. A trailing `/v1` is dropped.

    Raises:
        InvalidArgument: not an http or https URL.
    """
    text = url or os.environ.get("HETSERVE_URL") or DEFAULT_URL
    try:
        parsed = httpx.URL(text.rstrip("/").removesuffix("/v1") + "/")
        parsed.host.encode("idna")  # as resolving it does
    except (httpx.InvalidURL, UnicodeError) as error:
        raise InvalidArgument(f"Got url = {text!r} but expected something like {DEFAULT_URL}: {error}") from error
    if parsed.scheme not in ("http", "https") or not parsed.host or not 0 < (parsed.port or 80) < 65536:
        raise InvalidArgument(f"Got url = {text!r} but expected something like {DEFAULT_URL}")
    return parsed


def on_loopback(url: httpx.URL) -> bool:
    return url.host in ("localhost", "::1") or url.host.startswith("127.")


def default_headers(api_key: str | None) -> dict[str, str]:
    """The key is `api_key`, else `HETSERVE_API_KEY`, else none.

    Raises:
        InvalidArgument: a key that no header can hold.
    """
    key = api_key or os.environ.get("HETSERVE_API_KEY")
    if key and not (key.isascii() and key.isprintable()):
        raise InvalidArgument("the API key holds characters that no HTTP header can hold: a line's end, perhaps")
    headers = {"user-agent": f"hetserve/{__version__}", "accept": "application/json, text/event-stream"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    return headers


def generation_body(model: str, fields: Mapping[str, Any], options: Mapping[str, Any], stream: bool) -> dict[str, Any]:
    """The JSON of a completion or chat request. `extra` of the options is merged last."""
    body: dict[str, Any] = {"model": model, **fields}
    body.update((name, value) for name, value in options.items() if name != "extra" and value is not None)
    if "logit_bias" in body:
        body["logit_bias"] = {str(token): bias for token, bias in body["logit_bias"].items()}
    if stream:
        body.update(stream=True, stream_options={"include_usage": True})
    body.update(options.get("extra") or {})
    return body


def answer(response: httpx.Response, content: bytes) -> Answer:
    return Answer(response.status_code, response.reason_phrase, response.headers, content)


def check_size(body: bytearray) -> None:
    """Raises InvalidResponse on an answer that does not end."""
    if len(body) > MAX_ANSWER_BYTES:
        raise InvalidResponse(f"the server sent an answer of more than {MAX_ANSWER_BYTES} bytes")


def is_event_stream(response: httpx.Response) -> bool:
    kind: str = response.headers.get("content-type", "").partition(";")[0]
    return response.is_success and kind.strip().lower() == "text/event-stream"


def not_a_stream(answer: Answer) -> InvalidResponse:
    return InvalidResponse(f"asked for a stream, got {answer.headers.get('content-type', 'no content type')}")


def not_an_answer() -> InvalidResponse:
    return InvalidResponse("asked for an answer, got a stream: `stream_completions` and `stream_chat` read those")


def raise_for_status(answer: Answer) -> None:
    """Raises the StatusError of an error answer, and InvalidResponse for a redirect."""
    if answer.ok:
        return
    if answer.status < 400:
        raise InvalidResponse(f"the server answered {answer.status}, to look at {answer.headers.get('location', 'nothing')!r}")
    error = _error_object(answer)
    text = answer.content[:200].decode(errors="replace")
    raise status_error_type(answer.status)(
        _text(error.get("message")) or text or answer.reason,
        status=answer.status,
        code=_text(error.get("code")),
        param=_text(error.get("param")),
        kind=_text(error.get("type")),
        request_id=answer.request_id,
        retry_after_s=retry_after_s(answer.headers),
    )


def error_in_stream(data: Json, request_id: str | None) -> StreamError | None:
    """The error that an event carries instead of a chunk."""
    error = data.get("error")
    if error is None:
        return None
    if not isinstance(error, Mapping):
        error = {"message": error}
    message = _text(error.get("message")) or "the server reports an error and does not say which"
    return StreamError(message, code=_text(error.get("code")), request_id=request_id)


def health(answer: Answer) -> Health:
    """What /health said. 503 is an answer here; other errors raise as everywhere."""
    if answer.status != 503:
        raise_for_status(answer)
        return Health(ok=True, status="ok")
    try:
        data = parse_object(answer.content, "health report")
    except InvalidResponse as error:
        return Health(ok=False, status="unavailable", reasons=(str(error),))
    said = data.get("reasons") or _error_object(answer).get("message")
    texts = [_text(reason) for reason in (said if isinstance(said, list) else [said])]
    listed = tuple(text for text in texts if text)
    return Health(ok=False, status="unavailable", reasons=listed or ("the server says that it is unavailable",))


def only_model(ids: tuple[str, ...]) -> str:
    """The model to use when the caller names none. Raises InvalidResponse when the server has none."""
    if not ids:
        raise InvalidResponse("the server lists no model")
    return ids[0]


def _error_object(answer: Answer) -> dict[str, Any]:
    try:
        error = parse_object(answer.content, "error").get("error")
    except InvalidResponse:
        return {}
    return error if isinstance(error, dict) else {}


def _text(value: Any) -> str | None:
    """What a server says in words, or (some servers' codes) in numbers; nothing else is shown."""
    return str(value) if isinstance(value, str | int | float) else None


def _least(limit_s: float | None, remaining_s: float | None) -> float | None:
    return min((s for s in (limit_s, remaining_s) if s is not None), default=None)


def _seconds(limit_s: float | None) -> str:
    return "the time allowed" if limit_s is None else f"{limit_s:g} s"
