"""64 streams at once, for a minute: no error, and nothing that grows."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from cluster.launch import Cluster
from tests.support.cluster import left_over, serving
from tooling.model_factory import make_model

STREAMS = 64
SECONDS = 60.0
WARM_SECONDS = 10.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = make_model(tmp_path_factory.mktemp("models") / "llama", "llama", dtype="float32", seed=3)
    with serving(folder, "prefill", "decode") as cluster:
        yield cluster


async def stream(client: httpx.AsyncClient, dice: random.Random, hang_up_after: int | None) -> None:
    """One streamed completion, read to its end, or dropped after some events."""
    tokens = dice.randrange(1, 100)
    body = {
        "model": "tiny",
        "prompt": [dice.randrange(3, 200) for _ in range(dice.randrange(1, 200))],
        "max_tokens": tokens,
        "temperature": dice.choice([0, 0.8]),
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200, await answer.aread()
        events = 0
        usage = None
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                assert usage is not None
                assert usage["completion_tokens"] == tokens
                return
            if line:
                event = json.loads(line.removeprefix("data: "))
                assert "error" not in event, event
                usage = event.get("usage") or usage
                events += 1
                if events == hang_up_after:
                    return
        raise AssertionError("the stream ended without [DONE]")


async def load(url: str, seconds: float, seed: int) -> int:
    """`STREAMS` clients that ask again as soon as they are answered, a tenth of them hanging up early. Requests ended."""
    until_s = time.monotonic() + seconds
    ended = 0

    async def ask_again_and_again(client: httpx.AsyncClient, dice: random.Random) -> None:
        nonlocal ended
        while time.monotonic() < until_s:
            await stream(client, dice, dice.randrange(1, 20) if dice.random() < 0.1 else None)
            ended += 1

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        await asyncio.gather(*(ask_again_and_again(client, random.Random(seed + index)) for index in range(STREAMS)))
    return ended


def descriptors(cluster: Cluster) -> dict[str, int]:
    return {member.name: psutil.Process(member.pid).num_fds() for member in cluster.instances() if member.pid}


def grown(cluster: Cluster, before: dict[str, int], timeout_s: float = 15.0) -> dict[str, tuple[int, int]]:
    """Who has more descriptors than before, by more than a few, once connections that clients closed had time to end here too."""
    until_s = time.monotonic() + timeout_s
    while True:
        after = descriptors(cluster)
        more = {name: (before[name], after[name]) for name in before if after[name] > before[name] + 4}
        if not more or time.monotonic() > until_s:
            return more
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_64_streams_for_a_minute_fail_nothing_and_leave_nothing(cluster: Cluster) -> None:
    asyncio.run(load(cluster.url, WARM_SECONDS, seed=1))
    assert left_over(cluster) == []
    before, tasks = descriptors(cluster), httpx.get(f"{cluster.url}/debug/invariants").json()["tasks"]
    assert set(before) == {"gateway", "prefill0-0", "decode1-0"}
    assert asyncio.run(load(cluster.url, SECONDS, seed=1000)) > STREAMS
    assert left_over(cluster) == []
    assert httpx.get(f"{cluster.url}/debug/invariants").json()["failed"] == 0
    assert grown(cluster, before) == {}
    assert httpx.get(f"{cluster.url}/debug/invariants").json()["tasks"] <= tasks + 2
