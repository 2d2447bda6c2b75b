"""HTTP to Ray actor to Ray actor: what the client reads is what `transformers.generate` writes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.launch import Cluster
from tests.support.cluster import complete_all, left_over, serving, token_ids
from tests.support.reference import generate, prompts
from tooling.model_factory import make_model

LENGTHS = tuple(range(1, 160, 5))  # 32 ragged prompts, the longer ones cut into chunks
NEW_TOKENS = 24


@pytest.fixture(scope="module", params=["llama", "gemma3_text"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / request.param
    return make_model(folder, request.param, dtype="float32", seed=3, sliding_window=24)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[Cluster]:
    with serving(folder, "prefill", "decode", "decode") as cluster:
        yield cluster


def test_32_ragged_requests_at_once_are_exact_and_every_one_is_disaggregated(cluster: Cluster, folder: Path) -> None:
    asked = prompts(LENGTHS)
    answers = asyncio.run(complete_all(cluster.url, asked, max_tokens=NEW_TOKENS))
    expected = generate(folder, asked, NEW_TOKENS)
    assert len({token for output in expected for token in output}) > NEW_TOKENS
    assert [token_ids(answer) for answer in answers] == expected
    for answer, prompt in zip(answers, asked, strict=True):
        trace = answer["hetserve"]
        assert trace["prefill"].startswith("prefill")
        assert trace["decode"].startswith("decode")
        assert trace["kv_bytes"] > 0
        assert answer["usage"]["prompt_tokens"] == len(prompt)
        assert answer["choices"][0]["finish_reason"] == "length"
    assert left_over(cluster) == []


def test_prefix_cache_hits_change_nothing(cluster: Cluster, folder: Path) -> None:
    (stem,) = prompts((70,), seed=11)
    asked = [stem + tail for tail in prompts((1, 9, 30), seed=12)]
    first = asyncio.run(complete_all(cluster.url, asked[:1], max_tokens=NEW_TOKENS))
    rest = asyncio.run(complete_all(cluster.url, asked, max_tokens=NEW_TOKENS))
    expected = generate(folder, asked, NEW_TOKENS)
    assert [token_ids(answer) for answer in first + rest] == expected[:1] + expected
    assert max(answer["hetserve"]["cached_tokens"] for answer in rest) >= 64


def test_a_seed_draws_the_same_alone_in_a_crowd_and_on_either_worker(cluster: Cluster) -> None:
    (prompt,) = prompts((33,), seed=21)
    crowd = prompts(LENGTHS, seed=22)
    settings = {"max_tokens": NEW_TOKENS, "temperature": 0.9, "top_p": 0.95, "seed": 7}
    (alone,) = asyncio.run(complete_all(cluster.url, [prompt], **settings))
    answers = asyncio.run(complete_all(cluster.url, [*crowd[:8], prompt, *crowd[8:], prompt, prompt], **settings))
    same = [answers[8], answers[-2], answers[-1]]
    assert all(token_ids(answer) == token_ids(alone) for answer in same)
    served = [alone["hetserve"]["decode"], *(answer["hetserve"]["decode"] for answer in answers)]
    assert len(set(served)) == 2, "both decode instances took part"
    assert left_over(cluster) == []
