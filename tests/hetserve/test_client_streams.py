"""Both clients against a real socket: streams, hang-ups in either direction, and limits on time."""

from __future__ import annotations

import threading
import time

import pytest

from hetserve import ConnectionFailed, Retries, StreamError, TimedOut, Timeouts
from tests.hetserve.either import Either
from tests.hetserve.fake_server import Exchange, completion_chunk, serving, usage_chunk


def test_stream_gives_chunks_then_usage_and_trace(either: Either) -> None:
    def script(x: Exchange) -> None:
        assert x.json()["stream"] is True
        assert x.json()["stream_options"] == {"include_usage": True}
        x.begin_stream()
        x.event(completion_chunk("Hel"))
        x.event(completion_chunk("lo \u2028€", "stop"))
        x.event(usage_chunk(3, 2, hetserve={"prefill": "p", "decode": "d", "kv_bytes": 9}))
        x.event("[DONE]")

    with serving(script) as server:
        chunks, error = either.collect("stream_completions", "x", model="m", client={"url": server.url})
    assert error is None
    assert [chunk.text for chunk in chunks] == ["Hel", "lo \u2028€", ""]
    assert chunks[1].choices[0].finish_reason == "stop"
    assert chunks[2].usage is not None
    assert chunks[2].usage.completion_tokens == 2
    assert chunks[2].trace is not None
    assert chunks[2].trace.kv_bytes == 9


def test_chat_stream_reads_deltas(either: Either) -> None:
    def script(x: Exchange) -> None:
        assert x.path == "/v1/chat/completions"
        x.begin_stream()
        for delta in ({"role": "assistant", "content": ""}, {"content": "Hi"}, {}):
            x.event({"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        x.event("[DONE]")

    messages = [{"role": "user", "content": "hello"}]
    with serving(script) as server:
        chunks, error = either.collect("stream_chat", messages, model="m", client={"url": server.url})
    assert error is None
    assert [(chunk.text, chunk.choices[0].role) for chunk in chunks] == [("", "assistant"), ("Hi", None), ("", None)]


def test_chunks_are_handed_out_as_they_arrive_and_closing_hangs_up(either: Either) -> None:
    hung_up = threading.Event()

    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(completion_chunk("first"))
        if x.wait_hang_up():
            hung_up.set()

    with serving(script) as server:
        chunks, _ = either.collect("stream_completions", "x", model="m", stop_after=1, client={"url": server.url})
    assert [chunk.text for chunk in chunks] == ["first"]
    assert hung_up.is_set()


def test_an_error_in_the_stream_keeps_what_came_before_and_is_not_retried(either: Either) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(completion_chunk("a"))
        x.event({"error": {"message": "lost the worker", "type": "server_error", "code": "worker_lost"}})

    with serving(script) as server:
        chunks, error = either.collect("stream_completions", "x", model="m", client={"url": server.url})
        assert len(server.seen) == 1
    assert [chunk.text for chunk in chunks] == ["a"]
    assert isinstance(error, StreamError)
    assert error.code == "worker_lost"
    assert error.request_id == "req-1"


@pytest.mark.parametrize("reset", [False, True])
def test_a_stream_that_breaks_off_is_a_stream_error_and_is_not_retried(either: Either, reset: bool) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(completion_chunk("a"))
        if reset:
            x.reset()

    with serving(script) as server:
        chunks, error = either.collect("stream_completions", "x", model="m", client={"url": server.url})
        assert len(server.seen) == 1
    assert isinstance(error, StreamError)
    assert len(chunks) <= 1


def test_a_chunk_that_is_not_json_is_an_error_after_the_good_ones(either: Either) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(completion_chunk("a"))
        x.event("{oops")

    with serving(script) as server:
        chunks, error = either.collect("stream_completions", "x", model="m", client={"url": server.url})
    assert [chunk.text for chunk in chunks] == ["a"]
    assert error is not None
    assert "not JSON" in str(error)


def test_a_connection_cut_before_the_answer_is_tried_again(either: Either) -> None:
    with serving(lambda x: x.answer(body={"data": []}) if len(server.seen) == 3 else x.reset()) as server:
        assert either.call("models", client={"url": server.url}) == ()
        assert len(server.seen) == 3


def test_nobody_listening_is_a_failed_connection(either: Either) -> None:
    with serving(lambda x: None) as server:
        url = server.url
    with pytest.raises(ConnectionFailed):
        either.call("models", client={"url": url, "retries": Retries(limit=0)})


def test_silence_runs_into_the_read_limit(either: Either) -> None:
    over = threading.Event()
    with serving(lambda x: over.set() if x.wait_hang_up() else None) as server:
        settings = {"url": server.url, "retries": Retries(limit=0), "timeouts": Timeouts(read_s=0.05)}
        with pytest.raises(TimedOut) as caught:
            either.call("models", client=settings)
        assert caught.value.phase == "read"
        assert over.wait(5)


def test_silence_within_a_stream_runs_into_the_read_limit(either: Either) -> None:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(completion_chunk("a"))
        x.wait_hang_up()

    with serving(script) as server:
        settings = {"url": server.url, "timeouts": Timeouts(read_s=0.1)}
        chunks, error = either.collect("stream_completions", "x", model="m", client=settings)
        assert len(server.seen) == 1
    assert [chunk.text for chunk in chunks] == ["a"]
    assert isinstance(error, TimedOut)
    assert error.phase == "read"


@pytest.mark.parametrize("stream", [False, True])
def test_a_trickle_runs_into_the_total_limit(either: Either, stream: bool) -> None:
    def script(x: Exchange) -> None:
        if stream:
            x.begin_stream()
        else:
            x.head(200, {"content-type": "application/json", "connection": "close"})
        while not x.hung_up.wait(0.01):
            x.event(completion_chunk("a")) if stream else x.sock.sendall(b" ")

    started_s = time.monotonic()
    with serving(script) as server:
        settings = {"url": server.url, "timeouts": Timeouts(read_s=30, total_s=0.3)}
        if stream:
            chunks, error = either.collect("stream_completions", "x", model="m", client=settings)
            assert chunks
        else:
            with pytest.raises(TimedOut) as caught:
                either.call("models", client=settings)
            error = caught.value
    assert isinstance(error, TimedOut)
    assert error.phase == "total"
    assert time.monotonic() - started_s < 20


def test_many_streams_at_once_share_no_limit_on_connections() -> None:
    """More than httpx's default pool of 100."""
    import asyncio

    from hetserve import AsyncClient

    everyone = threading.Barrier(120, timeout=30)

    def script(x: Exchange) -> None:
        everyone.wait()
        x.answer(body={"data": []})

    async def run(url: str) -> int:
        async with AsyncClient(url, timeouts=Timeouts(connect_s=20)) as client:
            return len(await asyncio.gather(*(client.models() for _ in range(120))))

    with serving(script) as server:
        assert asyncio.run(run(server.url)) == 120
