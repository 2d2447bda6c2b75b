"""Pools that are asked for more than their caches hold: nobody freezes, nothing is lost, little is computed twice.

The load is closed: as long as requests are left, as many are under way as would fill `fullness` times the cache that writes.
All of it is real but time (see `tests.support.virtual`). The whole set:

    python -m pytest -m long tests/virtual/test_saturation.py
"""

from __future__ import annotations

import random

import pytest

from core.config import Role
from tests.support.virtual.cluster import VirtualCluster
from tests.support.virtual.instance import BLOCK_SIZE
from tests.support.virtual.oracle import written_alone

M, P, D = Role.MIXED, Role.PREFILL, Role.DECODE
SHAPES = ((M, M), (P, D), (M, M, M), (P, P, D), (M, P, D), (P, D, D))
NUM_BLOCKS = 64
LIMIT_S = 600.0


def saturate(seed: int, requests: int = 60) -> VirtualCluster:
    """Run one seed to its end, or to `LIMIT_S`."""
    dice = random.Random(seed)
    roles, fullness = SHAPES[seed % len(SHAPES)], dice.uniform(1.0, 1.5)
    cluster = VirtualCluster(roles, seed=seed, num_blocks=NUM_BLOCKS, max_num_batched_tokens=256)
    wanted_tokens = fullness * sum(role is not P for role in roles) * NUM_BLOCKS * BLOCK_SIZE
    gateway, left = cluster.gateways[0], requests

    def under_way_tokens() -> int:
        return sum(stream.request.max_context_tokens for stream in gateway.streams if not stream.ended)

    def top_up() -> None:
        nonlocal left
        while left and under_way_tokens() < wanted_tokens:
            left -= 1
            gateway.submit(cluster.request(f"r{left}", dice.randint(8, 500), dice.randint(2, 160)))
        if left:
            cluster.timeline.after(0.02, top_up)

    top_up()
    cluster.timeline.run(lambda: not left and all(stream.ended for stream in gateway.streams), LIMIT_S)
    assert not left, f"seed {seed}: {left} requests were never begun"
    return cluster


def check(seed: int) -> tuple[int, int]:
    """Tokens computed again, and tokens transferred."""
    cluster = saturate(seed)
    for stream in cluster.streams:
        assert stream.error is None, f"seed {seed}: {stream.request.request_id} failed: {stream.error!r}"
        assert stream.ended, f"seed {seed}: {stream.request.request_id} froze with {len(stream.tokens)} tokens"
        assert stream.tokens == written_alone(stream.request), f"seed {seed}: {stream.request.request_id} is not exact"
        assert stream.attempts == 1, f"seed {seed}: {stream.request.request_id} took {stream.attempts} attempts"
    assert cluster.left_over() == []
    again = sum(instance.engine.recomputed_tokens for instance in cluster.instances.values())
    return again, cluster.fabric.kv_bytes // cluster.bytes_per_token


def test_saturated_clusters_freeze_nobody_and_compute_little_twice() -> None:
    """One of each shape."""
    totals = [check(seed) for seed in range(len(SHAPES))]
    again, transferred = (sum(column) for column in zip(*totals, strict=True))
    assert transferred > 50_000
    assert again <= 0.05 * transferred


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_two_hundred_saturated_clusters() -> None:
    totals = [check(seed) for seed in range(200)]
    again, transferred = (sum(column) for column in zip(*totals, strict=True))
    print(f"200 seeds: {transferred} tokens transferred, {again} computed again ({again / transferred:.2%})")
    assert again <= 0.05 * transferred
