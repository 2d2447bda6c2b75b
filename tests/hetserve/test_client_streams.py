"""Both clients against a real socket: streams, hang-ups in either direction, and limits on time."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from collections.abc import Callable

import pytest

from hetserve import AsyncClient, Client, ConnectionFailed, Retries, StreamError, TimedOut, Timeouts, streams
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
    everyone = threading.Barrier(120, timeout=30)

    def script(x: Exchange) -> None:
        everyone.wait()
        x.answer(body={"data": []})

    async def run(url: str) -> int:
        async with AsyncClient(url, timeouts=Timeouts(connect_s=20)) as client:
            return len(await asyncio.gather(*(client.models() for _ in range(120))))

    with serving(script) as server:
        assert asyncio.run(run(server.url)) == 120


def test_a_server_that_leaves_the_response_open_after_done_is_hung_up_on(either: Either, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "END_S", 0.05)
    hung_up = threading.Event()

    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(completion_chunk("a", "stop"))
        x.event("[DONE]")
        if x.wait_hang_up():
            hung_up.set()

    with serving(script) as server:
        chunks, error = either.collect("stream_completions", "x", model="m", client={"url": server.url})
        assert hung_up.wait(10)
    assert ([chunk.text for chunk in chunks], error) == (["a"], None)


def test_a_connection_whose_stream_has_ended_carries_the_next_call() -> None:
    def script(x: Exchange) -> None:
        content = f"data: {json.dumps(completion_chunk('a'))}\n\ndata: [DONE]\n\n".encode()
        for _ in range(2):
            x.head(200, {"content-type": "text/event-stream", "transfer-encoding": "chunked"})
            x.sock.sendall(b"%x\r\n%b\r\n" % (len(content), content))
            x.sock.sendall(b"0\r\n\r\n")
            x.sock.recv(65536)

    with serving(script) as server, Client(server.url) as client:
        for _ in range(2):
            assert [chunk.text for chunk in client.stream_completions("x", model="m")] == ["a"]
        assert len(server.seen) == 1


def endless(hung_up: threading.Event) -> Callable[[Exchange], None]:
    def script(x: Exchange) -> None:
        x.begin_stream()
        x.event(completion_chunk("a"))
        if x.wait_hang_up():
            hung_up.set()

    return script


def test_leaving_a_loop_hangs_up_without_a_garbage_collector() -> None:
    hung_up = threading.Event()
    gc.disable()
    try:
        with serving(endless(hung_up)) as server, Client(server.url) as client:
            for _ in client.stream_completions("x", model="m"):
                break
            assert hung_up.wait(5)
    finally:
        gc.enable()


async def test_leaving_an_async_loop_hangs_up() -> None:
    hung_up = threading.Event()
    gc.disable()
    try:
        with serving(endless(hung_up)) as server:
            async with AsyncClient(server.url) as client:
                async for _ in await client.stream_completions("x", model="m"):
                    break
                assert await asyncio.to_thread(hung_up.wait, 5)
    finally:
        gc.enable()


def test_another_thread_may_close_a_stream_that_waits() -> None:
    hung_up = threading.Event()
    with serving(endless(hung_up)) as server, Client(server.url) as client:
        stream = client.stream_completions("x", model="m")
        assert next(stream).text == "a"
        found: list[BaseException] = []

        def read() -> None:
            try:
                next(stream)
            except BaseException as error:
                found.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        while not stream._chunks.gi_running:
            time.sleep(0.001)
        stream.close()
        reader.join(10)
        assert hung_up.wait(5)
    assert [type(error) for error in found] == [StreamError]


async def test_another_task_may_close_a_stream_that_waits() -> None:
    hung_up = threading.Event()
    with serving(endless(hung_up)) as server:
        async with AsyncClient(server.url) as client:
            stream = await client.stream_completions("x", model="m")
            assert (await anext(stream)).text == "a"
            reading = asyncio.create_task(anext(stream))
            await asyncio.sleep(0)
            await stream.aclose()
            with pytest.raises(StreamError):
                await reading
            assert await asyncio.to_thread(hung_up.wait, 5)


async def test_an_async_stream_that_is_out_of_time_hangs_up() -> None:
    hung_up, time_s = threading.Event(), 0.0
    with serving(endless(hung_up)) as server:
        async with AsyncClient(server.url, timeouts=Timeouts(total_s=100), clock=lambda: time_s) as client:
            stream = await client.stream_completions("x", model="m")
            assert (await anext(stream)).text == "a"
            time_s = 101.0
            with pytest.raises(TimedOut):
                await anext(stream)
            assert await asyncio.to_thread(hung_up.wait, 5)


def test_closing_the_client_ends_its_streams_with_an_error() -> None:
    hung_up = threading.Event()
    with serving(endless(hung_up)) as server:
        client = Client(server.url)
        stream = client.stream_completions("x", model="m")
        next(stream)
        client.close()
        with pytest.raises(StreamError):
            next(stream)


async def test_closing_the_async_client_ends_its_streams_with_an_error() -> None:
    hung_up = threading.Event()
    with serving(endless(hung_up)) as server:
        client = AsyncClient(server.url)
        stream = await client.stream_completions("x", model="m")
        await anext(stream)
        await client.aclose()
        with pytest.raises(StreamError):
            await anext(stream)


@pytest.mark.parametrize(
    ("head", "body"),
    [
        ({"transfer-encoding": "chunked"}, b"zz\r\n"),
        ({"transfer-encoding": "chunked"}, b"5\r\ndata:\r\n"),
        ({"transfer-encoding": "chunked"}, b"0\r\n\r\n"),
        ({"content-length": "100"}, b"data: "),
        ({}, b""),
    ],
)
def test_a_stream_of_broken_http_is_a_stream_error(either: Either, head: dict[str, str], body: bytes) -> None:
    def script(x: Exchange) -> None:
        x.head(200, {"content-type": "text/event-stream", **head})
        x.sock.sendall(body)

    with serving(script) as server:
        chunks, error = either.collect("stream_completions", "x", model="m", client={"url": server.url})
        assert len(server.seen) == 1
    assert chunks == []
    assert isinstance(error, StreamError)


@pytest.mark.parametrize(
    "raw", [b"HTTP/1.1 042 X\r\n\r\n", b"HTTP/1.1 101 X\r\n\r\n", b"HTTP/1.1 100 X\r\n\r\n", b"garbage\r\n\r\n"]
)
def test_what_is_not_http_is_a_failed_connection(either: Either, raw: bytes) -> None:
    with serving(lambda x: x.sock.sendall(raw)) as server, pytest.raises(ConnectionFailed):
        either.call("models", client={"url": server.url, "retries": Retries(limit=0)})
