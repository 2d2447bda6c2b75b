"""A real cluster on this machine, for end-to-end tests: Ray actors, HTTP, a model made on the spot."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from cluster.launch import Cluster
from core.config import parse_config

SMALL_ENGINE = {"kv_bytes": 16 << 20, "max_num_batched_tokens": 64, "max_num_seqs": 64}


AT_REST = ("in_flight", "journal_open", "attempts", "instances_with_work", "pump_attempts", "malformed_messages")


@contextmanager
def serving(folder: Path, *roles: str, **sections: Any) -> Iterator[Cluster]:
    """One fp32 instance per role, on Ray, behind HTTP on a free port. Silence means death, and leases end, only after a long
    while, so that a machine busy with other things changes nothing; tests of death say otherwise."""
    config = parse_config(
        {
            "model": str(folder),
            "dtype": "float32",
            "gateway": {"port": 0, "served_model_name": "tiny", **sections.pop("gateway", {})},
            "engine": {**SMALL_ENGINE, **sections.pop("engine", {})},
            "pools": [{"role": role, "name": f"{role}{index}"} for index, role in enumerate(roles)],
            "health": {"dead_after_s": 20.0, "stuck_after_s": 30.0, **sections.pop("health", {})},
            "transfer": {"lease_s": 20.0, **sections.pop("transfer", {})},
            **sections,
        }
    )
    with Cluster(config) as cluster:
        yield cluster


async def complete(client: httpx.AsyncClient, prompt: list[int], **fields: Any) -> dict[str, Any]:
    """One completion of a tokenised prompt, with its token ids and where it was served."""
    body = {"model": "tiny", "prompt": prompt, "temperature": 0, "ignore_eos": True, "return_token_ids": True, **fields}
    body.setdefault("min_tokens", body["max_tokens"] if body["temperature"] == 0 else 0)  # as the reference is asked
    answer = await client.post("/v1/completions", json=body, headers={"x-hetserve-trace": "1"})
    assert answer.status_code == 200, answer.text
    parsed: dict[str, Any] = answer.json()
    return parsed


async def complete_all(url: str, prompts: list[list[int]], **fields: Any) -> list[dict[str, Any]]:
    """All prompts at once."""
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=httpx.Limits(max_connections=None)) as client:
        return list(await asyncio.gather(*(complete(client, prompt, **fields) for prompt in prompts)))


def token_ids(answer: dict[str, Any]) -> list[int]:
    ids: list[int] = answer["choices"][0]["token_ids"]
    return ids


def left_over(cluster: Cluster, timeout_s: float = 15.0) -> list[str]:
    """What is still held somewhere although nobody asks for anything, once everybody had time to notice."""
    until_s = time.monotonic() + timeout_s
    while True:
        found = invariants(cluster.url)
        if not found or time.monotonic() > until_s:
            return found
        time.sleep(0.1)


def invariants(url: str) -> list[str]:
    """What does not add up at the gateway, and every instance it hears of that holds anything."""
    counts: dict[str, int] = httpx.get(f"{url}/debug/invariants").json()
    ended = counts["completed"] + counts["failed"] + counts["cancelled"]
    found = [f"{name}: {counts[name]}" for name in AT_REST if counts[name]]
    if counts["accepted"] != ended:
        found.append(f"{counts['accepted']} accepted, {ended} ended")
    for instance in httpx.get(f"{url}/debug/instances").json()["instances"]:
        busy = {name: instance[name] for name in ("running", "waiting", "held_blocks") if instance[name]}
        if busy or instance["free_blocks"] != instance["total_blocks"]:
            found.append(f"{instance['name']}: {busy}, {instance['free_blocks']} of {instance['total_blocks']} blocks free")
    return found
