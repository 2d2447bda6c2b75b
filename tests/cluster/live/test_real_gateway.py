"""The whole server, but for weights: the OpenAI door, the router, Ray, and instances on the simulated runner."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.launch import Cluster
from core.config import ClusterConfig
from tooling.model_factory import make_model

TOKENS = 120
BODY = {"prompt": "The quick brown fox", "max_tokens": TOKENS, "seed": 7, "ignore_eos": True}


@pytest.fixture(scope="module")
def cluster(configure: Callable[..., ClusterConfig], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    model: Path = make_model(tmp_path_factory.mktemp("served") / "tiny")
    slow = {"step_s": 0.02}
    config = configure({"role": "prefill", "cost": slow}, {"role": "decode", "replicas": 2, "cost": slow}, model=str(model))
    with Cluster(config) as running:
        yield running


def _open(cluster: Cluster, path: str, body: dict[str, Any] | None = None) -> Any:
    headers = {"content-type": "application/json", "x-hetserve-trace": "1"}
    data = None if body is None else json.dumps(body).encode()
    return urllib.request.urlopen(urllib.request.Request(cluster.url + path, data, headers), timeout=60)


def _ask(cluster: Cluster, body: dict[str, Any]) -> dict[str, Any]:
    with _open(cluster, "/v1/completions", body) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def test_a_stream_outlives_the_instance_that_writes_it(cluster: Cluster, until: Callable[..., Any]) -> None:
    text, chunks, killed = "", 0, ""
    chunk: dict[str, Any] = {}
    trace: dict[str, Any] = {}
    with _open(cluster, "/v1/completions", BODY | {"stream": True, "stream_options": {"include_usage": True}}) as stream:
        for line in stream:
            if not line.startswith(b"data: ") or b"[DONE]" in line:
                continue
            chunk = json.loads(line[len(b"data: ") :])
            assert "error" not in chunk
            text += "".join(choice["text"] for choice in chunk["choices"])
            chunks += 1
            if chunks == 5:
                killed = until(lambda: _writing(cluster))
                cluster.kill_instance(killed)
            trace = chunk.get("hetserve", {})
    unfailed = _ask(cluster, BODY)
    assert text == unfailed["choices"][0]["text"]
    assert chunk["usage"]["completion_tokens"] == TOKENS
    assert trace["attempts"] == 2
    assert killed != trace["decode"]
    until(lambda: all(member.pid for member in cluster.instances()))


def _writing(cluster: Cluster) -> str:
    """The decode instance that says it is at work, if any does."""
    with _open(cluster, "/debug/instances") as answer:
        instances = json.load(answer)["instances"]
    return next((one["name"] for one in instances if one["role"] == "decode" and one["running"]), "")
