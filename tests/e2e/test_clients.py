"""The clients that people use, against the whole thing: `openai`, `langchain-openai`, and ours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from langchain_openai import ChatOpenAI
from transformers import AutoModelForCausalLM

from cluster.launch import Cluster
from hetserve import Client
from tests.support.cluster import left_over, serving
from tooling.model_factory import make_model

MESSAGES = [{"role": "user", "content": "Why are GPUs fast?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "qwen3", "qwen3", dtype="float32", seed=3)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with serving(folder, "prefill", "decode") as cluster:
        yield cluster


@pytest.fixture
def client(cluster: Cluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="unused", timeout=60, max_retries=0) as client:
        yield client


def test_openai_reads_the_same_text_streamed_and_whole(client: openai.OpenAI, cluster: Cluster) -> None:
    settings: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 40, "temperature": 0.7, "seed": 3}
    whole = client.chat.completions.create(**settings)
    text, finish, usage = "", None, None
    for chunk in client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True}):
        usage = chunk.usage or usage
        for choice in chunk.choices:
            text += choice.delta.content or ""
            finish = choice.finish_reason or finish
    assert text == whole.choices[0].message.content
    assert finish == whole.choices[0].finish_reason
    assert usage == whole.usage
    assert left_over(cluster) == []


def test_openai_logprobs_are_the_models_own(client: openai.OpenAI, folder: Path) -> None:
    prompt = [5, 77, 130, 42, 9, 9, 61]
    answer = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=12, temperature=0, logprobs=3, extra_body={"return_token_ids": True}
    )
    choice: Any = answer.choices[0]
    ids = choice.token_ids
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt + ids])).logits[0].log_softmax(-1)
    for position, token in enumerate(ids):
        row = expected[len(prompt) - 1 + position]
        assert choice.logprobs.token_logprobs[position] == pytest.approx(float(row[token]), abs=1e-4)
        best = row.topk(3).values.tolist()
        reported = choice.logprobs.top_logprobs[position].values()  # by text, and two tokens may have the same
        assert reported
        assert all(min(abs(value - other) for other in best) < 1e-4 for value in reported)


def test_openai_gets_typed_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[5] * 5000, max_tokens=4)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")


def test_langchain_invokes_and_streams(cluster: Cluster) -> None:
    model = ChatOpenAI(model="tiny", base_url=f"{cluster.url}/v1", api_key="unused", temperature=0, max_tokens=30, timeout=60)
    whole = model.invoke("Why are GPUs fast?")
    streamed = "".join(str(chunk.content) for chunk in model.stream("Why are GPUs fast?"))
    assert streamed == whole.content
    assert whole.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] > 0


def test_our_client_says_where_it_was_served(cluster: Cluster) -> None:
    with Client(cluster.url) as client:
        with client.stream_completions("Once upon a time", model="tiny", max_tokens=8, ignore_eos=True, trace=True) as stream:
            chunks = list(stream)
        trace = chunks[-1].trace
        assert trace is not None
        assert trace.disaggregated
        assert trace.kv_bytes > 0
        assert {instance.role for instance in client.instances()} == {"prefill", "decode"}
