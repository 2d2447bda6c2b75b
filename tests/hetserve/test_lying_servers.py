"""Servers that do not keep to the API, and callers that do not: whatever happens is an `APIError`, and nothing hangs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hetserve import (
    APIError,
    AsyncClient,
    Client,
    ConnectionFailed,
    InvalidArgument,
    InvalidResponse,
    Retries,
    ServerError,
    StreamError,
    exchange,
    parsing,
)
from tests.hetserve.either import Either, mock

ONCE = Retries(limit=0)
COMPLETION: dict[str, Any] = {
    "id": "c",
    "model": "m",
    "created": 1,
    "choices": [{"index": 0, "text": "a", "finish_reason": "stop"}],
}

CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("completions", ("x",)),
    ("models", ()),
    ("tokenize", ("x",)),
    ("detokenize", ([1],)),
    ("health", ()),
    ("instances", ()),
    ("requests", ()),
    ("running", ()),
]

READERS: list[Callable[[parsing.Json], Any]] = [
    parsing.completion,
    parsing.chunk,
    parsing.models,
    parsing.tokenization,
    parsing.detokenization,
    parsing.instances,
    parsing.requests,
    parsing.running,
]

WORDS = """
id model created choices usage hetserve data tokens count prompt instances recent running index text message delta content
role logprobs token_ids stop_reason token logprob top_logprobs bytes token_logprobs text_offset prompt_tokens total_tokens
prompt_tokens_details cached_tokens attempts kv_bytes ttft_s error code max_model_len
"""
NAMES = st.sampled_from(WORDS.split())
ATOMS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([10**15, 1e308, float("inf")])
)
JSON = st.recursive(ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=8), max_leaves=30)


def server(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> dict[str, Any]:
    def handler(request: httpx.Request) -> httpx.Response:
        return httpx.Response(status, headers=headers, stream=httpx.ByteStream(content))

    return {**mock(handler), "retries": ONCE}


def events(content: bytes, kind: str = "text/event-stream") -> dict[str, Any]:
    return server(content, headers={"content-type": kind})


def data(body: Any) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


# --- answers ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=300)
@given(body=st.dictionaries(NAMES, JSON, max_size=8), wanted=st.sampled_from(READERS))
def test_json_of_any_shape_is_read_or_an_invalid_response(body: Any, wanted: Callable[[parsing.Json], Any]) -> None:
    with suppress(InvalidResponse):
        wanted(parsing.parse_object(json.dumps(body), "answer"))


@settings(deadline=None, max_examples=100)
@given(place=st.sampled_from(["id", "created", "choices", "usage", "hetserve", "index", "text", "message", "logprobs"]), lie=JSON)
def test_a_completion_with_one_lie_is_read_or_an_invalid_response(place: str, lie: Any) -> None:
    choice = {**COMPLETION["choices"][0], place: lie}
    body = {**COMPLETION, place: lie, "choices": lie if place == "choices" else [choice]}
    with suppress(InvalidResponse):
        assert isinstance(parsing.completion(body).text, str)


@settings(deadline=None, max_examples=60)
@given(content=st.binary(max_size=60), status=st.sampled_from([200, 204, 302, 400, 503]), call=st.sampled_from(CALLS))
def test_any_bytes_are_an_answer_or_an_api_error(content: bytes, status: int, call: tuple[str, tuple[Any, ...]]) -> None:
    with Client(**server(content, status)) as client, suppress(APIError):
        getattr(client, call[0])(*call[1])


NESTED = b"[" * 100_000


@pytest.mark.parametrize(
    "content",
    [
        NESTED,
        b'{"id": ' + NESTED,
        b'{"id": "c", "model": "m", "created": 1e999, "choices": []}',
        b'{"id": "c", "model": "m", "created": NaN, "choices": []}',
        b'{"id": ["c"], "model": "m", "created": 1, "choices": []}',
        b'{"id": "c", "model": "m", "created": 1, "choices": [{"index": 0, "text": 5}]}',
        b'{"id": "c", "model": "m", "created": 1, "choices": [{"index": 0, "finish_reason": {}}]}',
        b'{"id": "c", "model": "m", "created": 1, "choices": [{"index": 0, "logprobs": {"content": '
        b'[{"token": "a", "logprob": 0, "bytes": 100000000000000}]}}]}',
        b'{"id": "c", "model": "m", "created": 1, "choices": [], "usage": {"prompt_tokens": Infinity, "total_tokens": 1}}',
        b"\xff\xfe",
        b"",
        b'{"id": "c", "model": "m"',
    ],
)
def test_answers_that_break_a_parser_are_invalid_responses(either: Either, content: bytes) -> None:
    with pytest.raises(InvalidResponse):
        either.call("completions", "x", model="m", client=server(content))
    chunks, error = either.collect("stream_completions", "x", model="m", client=events(b"data: " + content + b"\n\n"))
    assert chunks == []
    assert isinstance(error, InvalidResponse)


@pytest.mark.parametrize(
    "content", [NESTED, b'{"error": {"message": ' + b"[" * 500 + b"]" * 500 + b"}}", b'{"error": {"message": 7}}']
)
def test_an_error_answer_of_any_shape_keeps_its_status(either: Either, content: bytes) -> None:
    with pytest.raises(ServerError) as caught:
        either.call("models", client=server(content, 500))
    assert caught.value.message


@pytest.mark.parametrize("status", [301, 302, 304, 307, 308])
def test_a_redirect_is_not_followed_and_names_where_it_leads(either: Either, status: int) -> None:
    with pytest.raises(InvalidResponse, match="elsewhere"):
        either.call("completions", "x", model="m", client=server(b"", status, {"location": "http://elsewhere.test/"}))


@pytest.mark.parametrize("place", ["http://xn--/", "http://[::1", "http://a..b/", "//", "http://a:99999/", "x" * 70_000, "\x00"])
def test_a_redirect_to_nowhere_is_an_api_error(either: Either, place: str) -> None:
    with pytest.raises(APIError):
        either.call("models", client=server(b"", 302, {"location": place}))


def test_a_body_that_cannot_be_decompressed_is_an_invalid_response(either: Either) -> None:
    with pytest.raises(InvalidResponse):
        either.call("models", client=server(b"zzzz", headers={"content-encoding": "gzip"}))


def test_an_answer_without_end_is_given_up(either: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "MAX_ANSWER_BYTES", 1000)
    with pytest.raises(InvalidResponse, match="more than 1000 bytes"):
        either.call("models", client=server(b" " * 1001))


def test_a_stream_where_an_answer_was_asked_for_is_refused_unread(either: Either) -> None:
    with pytest.raises(InvalidResponse, match="got a stream"):
        either.call("completions", "x", model="m", client=events(data(COMPLETION)))


# --- streams ----------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(lies=st.lists(JSON.map(data) | st.binary(max_size=20), max_size=5).map(b"".join))
def test_any_stream_gives_chunks_and_then_an_api_error_or_its_end(lies: bytes) -> None:
    with Client(**events(data(COMPLETION) + lies)) as client, client.stream_completions("x", model="m") as stream:
        assert next(stream).text == "a"
        with suppress(APIError):
            assert all(isinstance(chunk.text, str) for chunk in stream)


@pytest.mark.parametrize("kind", ["Text/Event-Stream; charset=utf-8", "text/event-stream ;x", "text/event-stream"])
def test_a_streams_content_type_is_compared_as_media_types_are(either: Either, kind: str) -> None:
    chunks, error = either.collect(
        "stream_completions", "x", model="m", client=events(data(COMPLETION) + b"data: [DONE]\n\n", kind)
    )
    assert ([chunk.text for chunk in chunks], error) == (["a"], None)


def test_another_content_type_is_no_stream(either: Either) -> None:
    with pytest.raises(InvalidResponse, match="text/event-streams"):
        either.call("stream_completions", "x", model="m", client=events(data(COMPLETION), "text/event-streams"))


@pytest.mark.parametrize(
    ("event", "message", "code"),
    [
        (data({"error": {"message": "lost", "code": 503}}), "lost", "503"),
        (data({"error": "lost"}), "lost", None),
        (data({"error": {}}), "does not say", None),
        (b"event: error\ndata: out of luck\n\n", "out of luck", None),
        (b'event: error\ndata: {"message": "lost", "code": "x"}\n\n', "lost", "x"),
    ],
)
def test_errors_in_a_stream_are_stream_errors_however_they_are_written(
    either: Either, event: bytes, message: str, code: str | None
) -> None:
    chunks, error = either.collect("stream_completions", "x", model="m", client=events(data(COMPLETION) + event))
    assert [chunk.text for chunk in chunks] == ["a"]
    assert isinstance(error, StreamError)
    assert message in str(error)
    assert error.code == code


def test_a_stream_that_cannot_be_decompressed_is_a_stream_error(either: Either) -> None:
    settings = server(b"zz", headers={"content-type": "text/event-stream", "content-encoding": "gzip", "x-request-id": "r7"})
    _, error = either.collect("stream_completions", "x", model="m", client=settings)
    assert isinstance(error, StreamError)
    assert error.request_id == "r7"


def test_the_last_id_is_of_the_last_chunk_handed_out() -> None:
    wire = b"id: 1\n" + data(COMPLETION) + b"id: 2\n" + data(COMPLETION) + b"data: [DONE]\n\n"
    with Client(**events(wire)) as client, client.stream_completions("x", model="m") as stream:
        assert stream.last_event_id is None
        next(stream)
        assert stream.last_event_id == "1"
        list(stream)
        assert stream.last_event_id == "2"


# --- callers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"temperature": float("nan")}, {"stop": "\ud800"}, {"extra": {"x": object()}}])
def test_what_json_cannot_hold_is_refused_before_anything_is_sent(either: Either, options: dict[str, Any]) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise AssertionError("sent")

    for name in ("completions", "stream_completions"):
        with pytest.raises(InvalidArgument, match="cannot be JSON"):
            either.call(name, "x", model="m", client=mock(handler), **options)
    assert either.slept == []


@pytest.mark.parametrize(
    "settings", [{"url": "http://a..b"}, {"url": "http://" + "a" * 70}, {"url": "http://h:99999"}, {"url": "ftp://x"}]
)
def test_a_host_that_cannot_be_resolved_at_all_is_refused_at_once(either: Either, settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        either.call("models", client=settings)


@pytest.mark.parametrize("key", ["clé", "a\nb", "a\x00"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(either: Either, key: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        either.call("models", client={"api_key": key, **mock(lambda request: httpx.Response(200))})
    assert key not in str(caught.value)


def test_a_closed_client_is_a_failed_connection_without_a_retry() -> None:
    slept: list[float] = []
    client = Client(**server(b'{"data": []}'), sleep=slept.append)
    client.close()
    for call in (client.models, lambda: client.stream_completions("x", model="m")):
        with pytest.raises(ConnectionFailed, match="the client is closed"):
            call()
    assert slept == []


async def test_a_closed_async_client_is_a_failed_connection() -> None:
    client = AsyncClient(**server(b'{"data": []}'))
    await client.aclose()
    with pytest.raises(ConnectionFailed, match="the client is closed"):
        await client.models()
    with pytest.raises(ConnectionFailed, match="the client is closed"):
        await client.stream_completions("x", model="m")


def test_an_idle_connection_is_given_up_well_before_the_server_does() -> None:
    from gateway.http.server import KEEP_ALIVE_S

    assert exchange.LIMITS.keepalive_expiry == exchange.KEEP_ALIVE_S
    assert exchange.KEEP_ALIVE_S <= KEEP_ALIVE_S / 2


def test_the_clients_pools_take_that_limit() -> None:
    for client in (Client("http://127.0.0.1:1"), Client("http://elsewhere.test")):
        with client:
            assert client._http._transport._pool._keepalive_expiry == exchange.KEEP_ALIVE_S  # type: ignore[attr-defined]


def test_streams_may_be_closed_by_another_thread_before_they_are_read() -> None:
    with Client(**events(data(COMPLETION))) as client:
        stream = client.stream_completions("x", model="m")
        closing = threading.Thread(target=stream.close)
        closing.start()
        closing.join()
        assert list(stream) == []
