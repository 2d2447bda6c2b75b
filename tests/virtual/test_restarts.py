"""Peers die and come back, again and again: streams go on, and nobody remembers the dead.

python -m pytest -m long tests/virtual/test_restarts.py
"""

from __future__ import annotations

import gc
import tracemalloc

import pytest

from core.config import Role
from tests.support.virtual.cluster import VirtualCluster
from tests.support.virtual.oracle import written_alone


def restart_often(times: int, lease_s: float) -> tuple[VirtualCluster, list[int]]:
    """Kill a worker in the midst of streams, `times` times in turn; the memory in use after each tenth of them, in bytes."""
    cluster = VirtualCluster((Role.PREFILL, Role.DECODE, Role.MIXED), seed=times, num_blocks=256, lease_s=lease_s)
    names, gateway, sizes = list(cluster.instances), cluster.gateways[0], []
    tracemalloc.start()
    for number in range(times):
        streams = [
            gateway.submit(cluster.request(f"r{number}-{index}", cluster.dice.randint(1, 100), cluster.dice.randint(1, 30)))
            for index in range(3)
        ]
        cluster.timeline.run_for(cluster.dice.uniform(0.0, 0.2))
        cluster.restart(names[number % len(names)])
        assert cluster.run_until_all_ended(cluster.timeline.now() + 60.0), f"restart {number}"
        for stream in streams:
            assert stream.error is None, f"restart {number}: {stream.error!r}"
            assert stream.tokens == written_alone(stream.request)
        gateway.streams.clear()
        if number % max(1, times // 10) == 0:
            cluster.timeline.run_for(3 * lease_s)
            gc.collect()
            sizes.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    return cluster, sizes


def test_streams_go_on_over_thirty_restarts() -> None:
    cluster, _ = restart_often(30, lease_s=5.0)
    assert cluster.left_over() == []


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_memory_is_flat_over_two_thousand_restarts() -> None:
    cluster, sizes = restart_often(2000, lease_s=5.0)
    print("MB in use after each 200 restarts:", [round(size / 1e6, 1) for size in sizes])
    assert cluster.left_over() == []
    assert sizes[-1] < 1.2 * sizes[2], sizes
