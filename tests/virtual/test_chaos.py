"""A control plane whose every message may be lost, repeated, late or out of order: each request ends in exact tokens or one
typed error, within three leases of its last progress, and nothing is left over.

The mail misbehaves by seed (`mail.faults`); KV goes its own way, whose faults have tests of their own. The whole set:

    python -m pytest -m long tests/virtual/test_chaos.py
"""

from __future__ import annotations

import random

import pytest

from core.config import Role
from core.layout import KVLayout, LayerShape
from mail.faults import Delay, Drop, Duplicate, RandomFaults, Reorder
from tests.support.virtual.cluster import LEASE_S, VirtualCluster
from tests.support.virtual.oracle import written_alone

SHAPES = ((Role.PREFILL, Role.DECODE), (Role.MIXED, Role.MIXED), (Role.PREFILL, Role.MIXED, Role.DECODE))
FAULTS = {
    "lost": (Drop(),),
    "repeated": (Duplicate(), Duplicate(0.05), Duplicate(2.0)),
    "late": (Delay(0.01), Delay(0.5), Delay(3.0)),
    "reordered": (Reorder(),),
    "all": (Drop(), Duplicate(0.05), Delay(0.5), Reorder()),
}


WINDOWS = (6, 6, 6, 6, 6, None), (48, None), (40, 40)


def storm(seed: int, kind: str, share: float, requests: int, **options: object) -> VirtualCluster:
    """Poisson arrivals through a storm, until all have ended."""
    faults = RandomFaults(seed, share, FAULTS[kind])
    cluster = VirtualCluster(SHAPES[seed % len(SHAPES)], seed=seed, faults=faults, gateways=2, **{"num_blocks": 512, **options})
    dice = random.Random(seed)
    at_s = cluster.timeline.now()
    for number in range(requests):
        at_s += dice.expovariate(20.0)
        request = cluster.request(f"r{number}", dice.randint(1, 200), dice.randint(1, 40))
        gateway = cluster.gateways[number % 2]
        cluster.timeline.at(at_s, lambda gateway=gateway, request=request: gateway.submit(request))
    cluster.timeline.run(lambda: len(cluster.streams) == requests and all(s.ended for s in cluster.streams), at_s + 600.0)
    assert len(cluster.streams) == requests
    return cluster


def check(cluster: VirtualCluster, what: str) -> int:
    """How many of the requests failed."""
    failed = 0
    for stream in cluster.streams:
        name = f"{what}: {stream.request.request_id}"
        assert stream.ended, f"{name} has neither ended nor failed, with {len(stream.tokens)} tokens"
        expected = written_alone(stream.request)
        if stream.error is None:
            assert stream.tokens == expected, f"{name} is not exact"
        else:
            failed += 1
            assert stream.tokens == expected[: len(stream.tokens)], f"{name} failed after wrong tokens"
        assert stream.longest_silence_s <= 3 * LEASE_S, f"{name} was silent for {stream.longest_silence_s:.1f} s"
    assert cluster.left_over() == [], what
    return failed


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("share", [0.01, 0.1])
def test_every_request_ends_exactly_or_with_one_typed_error(kind: str, share: float) -> None:
    check(storm(seed=len(kind), kind=kind, share=share, requests=60), f"{share:.0%} {kind}")


@pytest.mark.parametrize("windows", WINDOWS)
@pytest.mark.parametrize("share", [0.0, 0.1])
def test_layers_with_windows_change_nothing_but_what_goes_over(windows: tuple[int | None, ...], share: float) -> None:
    """In caches that could not hold what is under way if every layer kept everything."""
    layout = KVLayout.whole(layers=[LayerShape(1, 4, 4, window) for window in windows], dtype="float32", block_size=16)
    cluster = storm(1, "all", share, 60, layout=layout, num_blocks=120, max_num_batched_tokens=64)
    assert check(cluster, f"{windows} {share:.0%}") == 0 or share > 0
    assert cluster.fabric.kv_bytes > 0


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_through_every_kind_of_storm() -> None:
    runs = [(kind, share) for kind in FAULTS for share in (0.01, 0.1)]
    failed = 0
    for number, (kind, share) in enumerate(runs):
        failed += check(storm(number, kind, share, 10_000 // len(runs)), f"{share:.0%} {kind}")
    print(f"10,000 requests: {failed} ended with a typed error, all others with exact tokens")
