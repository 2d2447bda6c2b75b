"""The clients people use, over a real port; and clients that hang up."""

from __future__ import annotations

import json
import socket
import threading

import openai
import pytest
from langchain_openai import ChatOpenAI

from tests.gateway.fake_worker import expected_text


@pytest.fixture
def client(stage):
    with openai.OpenAI(base_url=f"{stage.service.url}/v1", api_key="unused", max_retries=0) as client:
        yield client


def chat_ids(stage, text):
    return stage.http.post("/tokenize", json={"messages": [{"role": "user", "content": text}]}).json()["tokens"]


def test_openai_chat_streamed_and_not(stage, client):
    stage.worker("p0", "prefill")
    stage.worker("d0", "decode")
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 9, "seed": 4}
    oracle = expected_text(chat_ids(stage, "hi"), 4, 9)
    whole = client.chat.completions.create(**ask)
    assert whole.choices[0].message.content == oracle
    chunks = list(client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == oracle
    assert chunks[-1].usage.completion_tokens == 9


def test_openai_completions_with_logprobs(stage, client):
    stage.worker("m0")
    whole = client.completions.create(model="tiny", prompt="hi", max_tokens=4, seed=4, logprobs=1)
    assert whole.choices[0].text == expected_text(stage.ids("hi"), 4, 4)
    assert whole.choices[0].logprobs.token_logprobs == [-0.25] * 4


def test_openai_sees_typed_errors(stage, client):
    stage.worker("m0")
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="hi", max_tokens=0)
    assert bad.value.body["param"] == "max_tokens"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="hi")


def test_openai_raises_when_a_stream_fails_in_the_middle(stage, client):
    def breaks(worker, submit):
        worker.send(worker.item(submit, 0))
        worker.fail(submit, "made_up_code", "it broke")

    stage.worker("m0", behave=breaks)
    stream = client.completions.create(model="tiny", prompt="hi", stream=True)
    assert len(next(iter(stream)).choices[0].text) == 1
    with pytest.raises(openai.APIError, match="it broke"):
        list(stream)
    stage.at_rest()


def test_langchain_streamed_and_not(stage):
    stage.worker("m0")
    model = ChatOpenAI(base_url=f"{stage.service.url}/v1", api_key="unused", model="tiny", max_tokens=7, seed=3)
    oracle = expected_text(chat_ids(stage, "hi"), 3, 7)
    assert model.invoke("hi").content == oracle
    assert "".join(chunk.content for chunk in model.stream("hi")) == oracle


def hang_up(stage, body, after: bytes) -> None:
    """Send a request on a raw socket, read until `after` has come, then reset the connection."""
    port = int(stage.service.url.rsplit(":", 1)[1])
    data = json.dumps(body).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        )
        client.sendall(head.encode() + data)
        seen = b""
        while after not in seen:
            seen += client.recv(4096)
        if not after:
            stage.until(lambda: stage.workers[-1].submits != [])


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_before_the_first_token_frees_both_workers(stage, stream):
    p0 = stage.worker("p0", "prefill", behave=lambda worker, submit: None)
    d0 = stage.worker("d0", "decode", behave=lambda worker, submit: None)
    hang_up(stage, {"model": "tiny", "prompt": "hi", "stream": stream}, after=b"")
    stage.until(lambda: p0.cancels == d0.cancels == [d0.submits[0].attempt])
    stage.at_rest()
    assert stage.invariants()["cancelled"] == 1


def test_a_client_that_hangs_up_mid_stream_frees_every_generation(stage):
    def one_token(worker, submit):
        worker.send(worker.item(submit, 0))

    m0 = stage.worker("m0", behave=one_token)
    hang_up(stage, {"model": "tiny", "prompt": "hi", "stream": True, "n": 3}, after=b'"index":2')
    stage.until(lambda: sorted(m0.cancels) == sorted(submit.attempt for submit in m0.submits))
    assert len(m0.cancels) == 3
    stage.at_rest()


def test_a_client_that_hangs_up_in_its_own_body_starts_nothing(stage):
    m0 = stage.worker("m0")
    port = int(stage.service.url.rsplit(":", 1)[1])
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(b'POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"model"')
    assert stage.http.get("/version").status_code == 200
    assert m0.submits == []
    stage.at_rest()


def test_nothing_is_left_running_after_many_requests(stage):
    stage.worker("p0", "prefill")
    stage.worker("d0", "decode")
    for index in range(20):
        body = {"model": "tiny", "prompt": "hi", "stream": bool(index % 2), "max_tokens": 3, "n": 2}
        assert stage.http.post("/v1/completions", json=body).status_code == 200
    stage.at_rest()
    counts = stage.invariants()
    assert counts["completed"] == 40
    stage.until(lambda: stage.invariants()["tasks"] <= counts["tasks"])
    assert counts["tasks"] < 10
    assert stage.service.invariants() == []


def test_what_is_under_way_shows_in_the_invariants(stage):
    m0 = stage.worker("m0", behave=lambda worker, submit: None)
    hold = threading.Thread(target=stage.http.post, args=("/v1/completions",), kwargs={"json": {"model": "tiny", "prompt": "hi"}})
    hold.start()
    stage.until(lambda: m0.submits != [])
    assert "in_flight: 1" in stage.service.invariants()
    m0.later(lambda: m0.answer(m0.submits[0]))
    hold.join()
    stage.until(lambda: stage.service.invariants() == [])
