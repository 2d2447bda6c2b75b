"""Workers die under load: every stream ends as if they had not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.launch import Cluster
from tests.support.cluster import complete_all, left_over, serving, token_ids
from tests.support.reference import prompts
from tooling.model_factory import make_model

LENGTHS = tuple(range(2, 100, 7))
NEW_TOKENS = 150


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = make_model(tmp_path_factory.mktemp("models") / "llama", "llama", dtype="float32", seed=3)
    with serving(folder, "prefill", "decode", "decode", health={"dead_after_s": 2.0}) as cluster:
        yield cluster


@pytest.mark.parametrize("victim", ["prefill0-0", "decode1-0"])
def test_a_killed_instance_costs_no_request_and_no_token(cluster: Cluster, victim: str) -> None:
    asked = prompts(LENGTHS, seed=31)
    settings = {"max_tokens": NEW_TOKENS, "temperature": 0.8, "seed": 5}
    expected = asyncio.run(complete_all(cluster.url, asked, **settings))
    before = {member.name: member.incarnation for member in cluster.instances()}

    async def under_fire() -> list[dict[str, object]]:
        requests = asyncio.create_task(complete_all(cluster.url, asked, **settings))
        await asyncio.sleep(0.4)
        cluster.kill_instance(victim)
        return await requests

    answers = asyncio.run(under_fire())
    assert [token_ids(answer) for answer in answers] == [token_ids(answer) for answer in expected]
    until_s = time.monotonic() + 60
    while {member.name: member.incarnation for member in cluster.instances()}[victim] <= before[victim]:
        assert time.monotonic() < until_s, "no replacement"
        cluster.wait_changed(0.2)
    while any(member.phase.value != "ready" for member in cluster.instances()):
        assert time.monotonic() < until_s, "the replacement never got ready"
        cluster.wait_changed(0.2)
    again = asyncio.run(complete_all(cluster.url, asked, **settings))
    assert [token_ids(answer) for answer in again] == [token_ids(answer) for answer in expected]
    assert left_over(cluster) == []
