"""Both clients against a mock transport: what they send, what they make of answers, when they try again."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from hetserve import (
    APIError,
    BadRequest,
    ConnectionFailed,
    InvalidResponse,
    NotFound,
    RateLimited,
    Retries,
    ServerError,
    StatusError,
    TimedOut,
    Unauthorized,
)
from tests.hetserve.either import Either, mock

COMPLETION = {
    "id": "cmpl-1",
    "object": "text_completion",
    "created": 7,
    "model": "m",
    "choices": [{"index": 0, "text": " world", "logprobs": None, "finish_reason": "length", "token_ids": [5, 6]}],
    "usage": {
        "prompt_tokens": 3,
        "completion_tokens": 2,
        "total_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 1},
    },
}


def always(status: int, body: Any, headers: dict[str, str] | None = None) -> Callable[[httpx.Request], httpx.Response]:
    return lambda request: httpx.Response(status, json=body, headers=headers)


def test_completion_is_sent_and_read_whole(either: Either) -> None:
    seen: list[httpx.Request] = []

    def handler(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json=COMPLETION, headers={"x-request-id": "r1"})

    settings = {**mock(handler), "api_key": "secret-key"}
    got = either.call("completions", [1, 2, 3], model="m", max_tokens=2, logit_bias={5: 1.5}, extra={"x": 1}, client=settings)
    assert json.loads(seen[0].content) == {
        "model": "m",
        "prompt": [1, 2, 3],
        "max_tokens": 2,
        "logit_bias": {"5": 1.5},
        "x": 1,
    }
    assert str(seen[0].url) == "http://server.test/v1/completions"
    assert seen[0].headers["authorization"] == "Bearer secret-key"
    assert "x-hetserve-trace" not in seen[0].headers
    assert (got.text, got.request_id, got.choices[0].token_ids) == (" world", "r1", (5, 6))
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.cached_tokens) == (3, 2, 1)


def test_trace_is_asked_for_by_header_and_read(either: Either) -> None:
    served = {"prefill": "prefill-0", "decode": "decode-0", "kv_bytes": 4096, "cached_tokens": 0, "ttft_s": 0.1, "tpot_s": None}

    def handler(request: httpx.Request) -> httpx.Response:
        assert request.headers["x-hetserve-trace"] == "1"
        return httpx.Response(200, json={**COMPLETION, "hetserve": served})

    trace = either.call("completions", "hi", model="m", trace=True, client=mock(handler)).trace
    assert (trace.prefill, trace.decode, trace.kv_bytes, trace.ttft_s, trace.tpot_s) == ("prefill-0", "decode-0", 4096, 0.1, None)


def test_every_choice_has_its_trace(either: Either) -> None:
    served = [{"prefill": "p0", "decode": f"d{n}", "tokens": n} for n in range(3)]
    choices = [{"index": n, "text": str(n)} for n in range(3)]
    body = {**COMPLETION, "choices": choices, "hetserve": served}
    got = either.call("completions", "hi", model="m", n=3, trace=True, client=mock(always(200, body)))
    assert [trace.decode for trace in got.traces] == ["d0", "d1", "d2"]
    assert got.trace == got.traces[0]
    assert either.call("completions", "hi", model="m", client=mock(always(200, COMPLETION))).traces == ()

    def streamed(request: httpx.Request) -> httpx.Response:
        last = {**COMPLETION, "choices": [], "hetserve": served}
        content = f"data: {json.dumps(last)}\n\ndata: [DONE]\n\n".encode()
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=httpx.ByteStream(content))

    (chunk,), error = either.collect("stream_completions", "hi", model="m", n=3, trace=True, client=mock(streamed))
    assert error is None
    assert [trace.decode for trace in chunk.traces] == ["d0", "d1", "d2"]
    assert chunk.trace == chunk.traces[0]


def test_chat_reads_message_and_logprobs(either: Either) -> None:
    top = [{"token": "Hi", "logprob": -0.1, "bytes": [72, 105]}, {"token": "Ho", "logprob": -2.0, "bytes": None}]
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": "Hi"},
        "logprobs": {"content": [{"token": "Hi", "logprob": -0.1, "bytes": [72, 105], "top_logprobs": top}]},
        "finish_reason": "stop",
    }
    body = {"id": "c", "created": 1, "model": "m", "choices": [choice]}
    messages = [{"role": "user", "content": "hello"}]
    got = either.call("chat", messages, model="m", logprobs=True, top_logprobs=2, client=mock(always(200, body)))
    assert (got.text, got.choices[0].role, got.choices[0].finish_reason) == ("Hi", "assistant", "stop")
    (logprob,) = got.choices[0].logprobs
    assert (logprob.token, logprob.bytes, [t.token for t in logprob.top]) == ("Hi", b"Hi", ["Hi", "Ho"])


def test_completion_logprobs_are_sorted_and_keep_offsets(either: Either) -> None:
    logprobs = {
        "tokens": ["a", "b"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"c": -3.0, "b": -1.0}],
        "text_offset": [0, 1],
    }
    body = {**COMPLETION, "choices": [{"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": logprobs}]}
    first, second = either.call("completions", "x", model="m", client=mock(always(200, body))).choices[0].logprobs
    assert (first.logprob, first.top, first.text_offset) == (None, (), 0)
    assert ([t.token for t in second.top], second.text_offset) == (["b", "c"], 1)


def test_model_is_asked_for_once_when_none_is_named() -> None:
    paths: list[str] = []

    def handler(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "served", "max_model_len": 2048}]})
        assert json.loads(request.content)["model"] == "served"
        return httpx.Response(200, json=COMPLETION)

    from hetserve import Client

    with Client(**mock(handler)) as client:
        client.completions("a")
        client.completions("b")
    assert paths == ["/v1/models", "/v1/completions", "/v1/completions"]


def test_tokenize_and_detokenize(either: Either) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        if request.url.path == "/tokenize":
            assert body == {"model": "m", "prompt": "hi", "add_special_tokens": False}
            return httpx.Response(200, json={"tokens": [7, 8], "count": 2, "max_model_len": 64})
        assert body == {"model": "m", "tokens": [7, 8]}
        return httpx.Response(200, json={"prompt": "hi"})

    got = either.call("tokenize", "hi", model="m", add_special_tokens=False, client=mock(handler))
    assert (got.tokens, got.count, got.max_model_len) == ((7, 8), 2, 64)
    assert either.call("detokenize", [7, 8], model="m", client=mock(handler)) == "hi"


def test_health_reports_reasons_without_retrying(either: Either) -> None:
    ok = either.call("health", client=mock(always(200, {"status": "ok"})))
    down = either.call("health", client=mock(always(503, {"status": "unavailable", "reasons": ["no decode instance"]})))
    assert (ok.ok, down.ok, down.reasons) == (True, False, ("no decode instance",))
    assert either.slept == []


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, Unauthorized),
        (403, Unauthorized),
        (404, NotFound),
        (413, BadRequest),
        (422, BadRequest),
        (429, RateLimited),
        (500, ServerError),
        (503, ServerError),
    ],
)
def test_error_answers_become_typed_errors(either: Either, status: int, kind: type[StatusError]) -> None:
    error = {"error": {"message": "no such thing", "type": "some_type", "param": "prompt", "code": "some_code"}}
    settings = {**mock(always(status, error, {"x-request-id": "r9"})), "retries": Retries(limit=0)}
    with pytest.raises(kind, match="no such thing") as caught:
        either.call("completions", "x", model="m", client=settings)
    got = caught.value
    assert (got.status, got.code, got.param, got.kind, got.request_id) == (status, "some_code", "prompt", "some_type", "r9")


def test_error_page_that_is_not_json_still_becomes_a_typed_error(either: Either) -> None:
    settings = {**mock(lambda request: httpx.Response(502, text="<html>bad gateway")), "retries": Retries(limit=0)}
    with pytest.raises(ServerError, match="bad gateway"):
        either.call("models", client=settings)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504])
def test_passing_trouble_is_retried_twice_with_growing_waits(either: Either, status: int) -> None:
    tried = []

    def handler(request: httpx.Request) -> httpx.Response:
        tried.append(request)
        return httpx.Response(status, json={})

    with pytest.raises(StatusError):
        either.call("completions", "x", model="m", client=mock(handler))
    assert len(tried) == 3
    assert either.slept == [0.5, 1.0]


def test_success_after_a_retry_is_returned(either: Either) -> None:
    answers = [httpx.Response(503), httpx.Response(200, json=COMPLETION)]
    assert either.call("completions", "x", model="m", client=mock(lambda request: answers.pop(0))).text == " world"


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_the_callers_mistakes_are_not_retried(either: Either, status: int) -> None:
    with pytest.raises(StatusError):
        either.call("models", client=mock(always(status, {})))
    assert either.slept == []


def test_retry_after_is_waited_for(either: Either) -> None:
    with pytest.raises(RateLimited) as caught:
        either.call("models", client=mock(always(429, {}, {"retry-after": "3"})))
    assert either.slept == [3.0, 3.0]
    assert caught.value.retry_after_s == 3.0


def test_retry_after_beyond_the_cap_is_left_to_the_caller(either: Either) -> None:
    with pytest.raises(RateLimited) as caught:
        either.call("models", client=mock(always(429, {}, {"retry-after": "3600"})))
    assert either.slept == []
    assert caught.value.retry_after_s == 3600.0


def test_the_servers_word_overrules_the_status(either: Either) -> None:
    with pytest.raises(ServerError):
        either.call("models", client=mock(always(503, {}, {"x-should-retry": "false"})))
    assert either.slept == []


@pytest.mark.parametrize(
    ("raised", "kind", "phase"),
    [
        (httpx.ConnectError("refused"), ConnectionFailed, None),
        (httpx.RemoteProtocolError("hung up"), ConnectionFailed, None),
        (httpx.ConnectTimeout("slow"), TimedOut, "connect"),
        (httpx.ReadTimeout("slow"), TimedOut, "read"),
    ],
)
def test_transport_failures_are_retried_then_typed(
    either: Either, raised: httpx.TransportError, kind: type[APIError], phase: str | None
) -> None:
    def handler(request: httpx.Request) -> httpx.Response:
        raise raised

    with pytest.raises(kind) as caught:
        either.call("models", client=mock(handler))
    assert len(either.slept) == 2
    assert getattr(caught.value, "phase", None) == phase


def test_no_retry_that_would_end_after_the_total_limit(either: Either) -> None:
    from hetserve import Timeouts

    with pytest.raises(ServerError):
        either.call("models", client={**mock(always(503, {})), "timeouts": Timeouts(total_s=0.4)})
    assert either.slept == []


@pytest.mark.parametrize("content", [b"not json", b"[]", b'{"id": "x"}', b'{"data": 3}', b"\xff"])
def test_answers_of_another_shape_are_invalid_responses(either: Either, content: bytes) -> None:
    with pytest.raises(InvalidResponse):
        either.call("models", client=mock(lambda request: httpx.Response(200, content=content)))


def test_a_plain_answer_to_a_streaming_request_is_an_invalid_response(either: Either) -> None:
    with pytest.raises(InvalidResponse, match="asked for a stream"):
        either.call("stream_completions", "x", model="m", client=mock(always(200, COMPLETION)))


def test_settings_come_from_the_environment(either: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETSERVE_URL", "http://elsewhere.test:9/v1/")
    monkeypatch.setenv("HETSERVE_API_KEY", "from-env")

    def handler(request: httpx.Request) -> httpx.Response:
        assert str(request.url) == "http://elsewhere.test:9/v1/models"
        assert request.headers["authorization"] == "Bearer from-env"
        return httpx.Response(200, json={"data": []})

    assert either.call("models", client={"transport": httpx.MockTransport(handler)}) == ()


@pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "http://", "http://[::1"])
def test_a_url_that_is_none_is_refused_at_once(either: Either, url: str) -> None:
    with pytest.raises(ValueError, match="expected something like"):
        either.call("models", client={"url": url})
