"""Clusters of real processes: a local Ray, real instances on the simulated runner, and a gateway without an API."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cluster.controller import Factories, MemberView
from cluster.launch import Cluster

FAKES = Path(__file__).parents[1] / "fakes"
FAKE_GATEWAY = Factories(gateway="fake_gateway:FakeGateway")


@pytest.fixture(scope="session")
def fakes() -> dict[str, Any]:
    """Keywords of `Cluster` and `serve` that put the fake gateway in."""
    return {"factories": FAKE_GATEWAY, "python_path": [str(FAKES)]}


def _until(condition: Callable[[], Any], timeout_s: float = 60.0) -> Any:
    until_s = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < until_s, "it did not come to be in time"
        time.sleep(0.02)
    return found


@pytest.fixture(scope="session")
def until() -> Callable[..., Any]:
    """Wait for a condition to hold; what it answered."""
    return _until


@pytest.fixture(scope="session")
def heard() -> Callable[[Cluster], dict[str, list[Any]]]:
    """What the fake gateway has heard: name -> [incarnation, role, accelerator, node]."""

    def ask(cluster: Cluster) -> dict[str, list[Any]]:
        with urllib.request.urlopen(f"{cluster.url}/heard", timeout=5) as answer:
            found: dict[str, list[Any]] = json.load(answer)
        return found

    return ask


@pytest.fixture(scope="session")
def member() -> Callable[[Cluster, str], MemberView]:
    return lambda cluster, name: next(view for view in cluster.instances() if view.name == name)
