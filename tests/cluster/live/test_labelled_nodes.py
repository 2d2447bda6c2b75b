"""Placement on a cluster of several nodes that Ray believes in: labels and resources are made up, processes are real."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster as Nodes

from cluster.controller import MemberView
from cluster.launch import Cluster
from cluster.own_processes import OwnProcesses
from cluster.placement import ACCELERATOR_LABEL
from cluster.ray_session import prepare_local, read_environment_again
from core.config import ClusterConfig
from core.errors import NoSuchAccelerator

Heard = Callable[[Cluster], dict[str, list[Any]]]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    """A head without accelerators, a node with two H100 and one with an L40S."""
    processes = OwnProcesses()
    prepare_local(os.environ)
    read_environment_again()
    head = {"num_cpus": 2, "include_dashboard": False}
    cluster = Nodes(initialize_head=True, connect=True, head_node_args=head)
    try:
        cluster.add_node(num_cpus=8, num_gpus=2, labels={ACCELERATOR_LABEL: "H100"})
        cluster.add_node(num_cpus=4, num_gpus=1, labels={ACCELERATOR_LABEL: "L40S", "zone": "b"})
        cluster.wait_for_nodes()
        yield cluster
    finally:
        ray.shutdown()
        cluster.shutdown()
        processes.end()


def test_pools_run_where_their_accelerators_are_and_a_joined_cluster_is_left_alone(
    nodes: Nodes,
    configure: Callable[..., ClusterConfig],
    fakes: dict[str, Any],
    heard: Heard,
    until: Callable[..., Any],
    member: Callable[[Cluster, str], MemberView],
) -> None:
    config = configure(
        {"role": "prefill", "accelerator": "H100", "resources": {"gpus": 2}},
        {"role": "decode", "accelerator": ["A10G", "L40S"], "labels": {"zone": "b"}, "resources": {"gpus": 0.5}},
    )
    with Cluster(config, **fakes) as cluster:
        until(lambda: len(heard(cluster)) == 2)
        assert {name: said[2] for name, said in heard(cluster).items()} == {"prefill-0": "H100", "decode-0": "L40S"}
        free = ray.available_resources()
        assert free["GPU"] == 0.5
        before = member(cluster, "prefill-0")
        cluster.kill_instance("prefill-0")
        after = until(lambda: (view := member(cluster, "prefill-0")).incarnation > 1 and view.pid and view)
        assert (after.node, after.accelerator) == (before.node, before.accelerator)
    assert ray.is_initialized()
    until(lambda: ray.available_resources().get("GPU") == 3.0)


def test_an_accelerator_that_no_node_has_is_an_error_and_leaves_no_actor_behind(
    nodes: Nodes, configure: Callable[..., ClusterConfig], fakes: dict[str, Any]
) -> None:
    config = configure({"role": "prefill"}, {"role": "decode", "accelerator": "B200", "resources": {"gpus": 1}})
    with pytest.raises(NoSuchAccelerator, match=r"pools\[1\]: asked for 1 GPU, accelerator B200, but the cluster has .*L40S"):
        Cluster(config, **fakes).start()
    with pytest.raises(NoSuchAccelerator, match=r"pools\[0\]: no room for all 3"):
        Cluster(configure({"role": "mixed", "replicas": 3, "accelerator": "H100", "resources": {"gpus": 1}}), **fakes).start()
    assert ray.available_resources()["GPU"] == 3.0
