"""Instances change role while they serve, and no stream notices."""

from __future__ import annotations

import pytest

from core.config import Role
from tests.support.virtual.cluster import VirtualCluster
from tests.support.virtual.oracle import written_alone

STREAMS = 64
FLIP_S = 5.0


def keep_streaming(cluster: VirtualCluster, until_s: float) -> None:
    """As many streams as that at all times: one that ends is followed by another."""
    gateway = cluster.gateways[0]

    def top_up() -> None:
        for _ in range(STREAMS - gateway.live):
            name = f"r{len(gateway.streams)}"
            gateway.submit(cluster.request(name, cluster.dice.randint(1, 300), cluster.dice.randint(1, 120)))
        if cluster.timeline.now() < until_s:
            cluster.timeline.after(0.01, top_up)

    top_up()


@pytest.mark.parametrize("seed", range(3))
def test_a_minute_of_flips_under_64_streams_fails_none(seed: int) -> None:
    cluster = VirtualCluster((Role.PREFILL, Role.DECODE, Role.MIXED), seed=seed, num_blocks=2048)
    end_s = cluster.timeline.now() + 60.0
    names, flips = list(cluster.instances), 0

    def flip() -> None:
        """One instance takes another role; somebody who can decode stays."""
        nonlocal flips
        if cluster.timeline.now() >= end_s:
            return
        name = names[flips % len(names)]
        others = [cluster.instances[other].loop.progress.role for other in names if other != name]
        roles = [role for role in Role if role is not Role.PREFILL or any(other is not Role.PREFILL for other in others)]
        cluster.instances[name].set_role(roles[cluster.dice.randrange(len(roles))])
        flips += 1
        cluster.timeline.after(FLIP_S, flip)

    keep_streaming(cluster, end_s)
    flip()
    assert cluster.timeline.run(lambda: cluster.timeline.now() >= end_s, end_s + 1.0)
    assert cluster.run_until_all_ended(end_s + 60.0)
    assert flips == 12
    for stream in cluster.streams:
        assert stream.error is None, f"{stream.request.request_id}: {stream.error!r}"
        assert stream.tokens == written_alone(stream.request)
    assert cluster.left_over() == []


def test_a_drain_can_be_taken_back() -> None:
    cluster = VirtualCluster((Role.MIXED,), seed=1)
    instance, gateway = cluster.instances["mixed0"], cluster.gateways[0]
    instance.loop.drain()
    instance.wake()
    cluster.timeline.run_for(0.5)
    stream = gateway.submit(cluster.request("waits", 20, 5))
    cluster.timeline.run_for(2.0)
    assert not stream.tokens
    instance.loop.drain(False)
    instance.wake()
    assert cluster.run_until_all_ended(cluster.timeline.now() + 10.0)
    assert stream.tokens == written_alone(stream.request)
