"""An engine that hangs inside a step while its process goes on answering and beating."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.controller import MemberView
from cluster.launch import Cluster
from core.config import ClusterConfig
from tooling.model_factory import make_model

STUCK_AFTER_S = 4.0


def test_an_instance_stuck_in_a_step_is_replaced_and_idle_ones_are_not(
    configure: Callable[..., ClusterConfig],
    member: Callable[[Cluster, str], MemberView],
    until: Callable[..., Any],
    tmp_path: Path,
) -> None:
    model = make_model(tmp_path / "tiny")
    config = configure(
        {"role": "mixed", "name": "stuck", "cost": {"step_s": 3600.0}},
        {"role": "prefill", "name": "idle", "cost": {"step_s": 3600.0}},
        model=str(model),
        health={"stuck_after_s": STUCK_AFTER_S},
        router={"policy": "round-robin", "local_prefill_tokens": 4096},
    )
    with Cluster(config) as cluster:
        asking = threading.Thread(target=_ask, args=(cluster.url,), daemon=True)
        asking.start()
        replaced = until(lambda: (view := member(cluster, "stuck-0")).incarnation > 1 and view)
        assert replaced.reason.startswith("stuck: no sign of life")
        until(lambda: member(cluster, "stuck-0").pid)
        assert member(cluster, "idle-0").incarnation == 1
    asking.join(timeout=60)
    assert not asking.is_alive()


def _ask(url: str) -> None:
    """Its answer does not matter: it may be lost with the cluster."""
    body = json.dumps({"prompt": "Hello", "max_tokens": 4}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    with contextlib.suppress(OSError):
        urllib.request.urlopen(request, timeout=120).read()
