"""One local cluster, shared by the tests of this file: its own Ray, real processes, real sockets."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
import ray

from cluster.controller import MemberView
from cluster.launch import Cluster
from core.config import ClusterConfig
from core.errors import PortInUse

Heard = Callable[[Cluster], dict[str, list[Any]]]
Find = Callable[[Cluster, str], MemberView]
Until = Callable[..., Any]


@pytest.fixture(scope="module")
def cluster(configure: Callable[..., ClusterConfig], fakes: dict[str, Any]) -> Iterator[Cluster]:
    config = configure({"role": "prefill"}, {"role": "decode"}, health={"stuck_after_s": 6.0})
    with Cluster(config, **fakes) as running:
        yield running
        children = psutil.Process().children(recursive=True)
        assert any("raylet" in child.name() for child in children)
    assert not ray.is_initialized()
    assert [child for child in children if child.is_running()] == [], "stop left processes behind"


def test_start_up_says_where_the_time_went(cluster: Cluster) -> None:
    assert {"import ray", "start ray", "members", "first heartbeats"} <= set(cluster.seconds)
    assert sum(cluster.seconds.values()) <= cluster.total_s
    for member in cluster.instances():
        assert {"process", "imports"} <= set(member.seconds)


def test_a_simulated_cluster_costs_little_enough_to_start_in_half_a_minute_on_two_cores(cluster: Cluster) -> None:
    """In processor seconds, which other work on the machine does not change as it does wall-clock time."""
    spent_s = sum(sum(process.cpu_times()[:2]) for process in psutil.Process().children(recursive=True))
    assert spent_s < 30.0


def test_the_gateway_hears_every_instance_in_its_role(cluster: Cluster, heard: Heard, until: Until) -> None:
    until(lambda: len(heard(cluster)) == 2)
    assert {name: said[1:3] for name, said in heard(cluster).items()} == {
        "prefill-0": ["prefill", "CPU"],
        "decode-0": ["decode", "CPU"],
    }


def test_nothing_of_it_listens_beyond_loopback(cluster: Cluster) -> None:
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    listening = {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    assert listening


def test_threads_are_divided_and_the_network_is_not_asked_for_models(cluster: Cluster, member: Find) -> None:
    environments = [psutil.Process(member(cluster, name).pid).environ() for name in ("prefill-0", "decode-0")]
    share = str(max(1, int(ray.cluster_resources()["CPU"]) // 2))
    for environment in environments:
        assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == share
        assert environment["HF_HUB_OFFLINE"] == "1"


def test_a_killed_instance_is_replaced_with_a_higher_incarnation(
    cluster: Cluster, member: Find, heard: Heard, until: Until
) -> None:
    before, other = member(cluster, "decode-0"), member(cluster, "prefill-0")
    assert before.pid is not None
    os.kill(before.pid, signal.SIGKILL)
    until(lambda: heard(cluster).get("decode-0", [0])[0] > before.incarnation)
    after = until(lambda: (view := member(cluster, "decode-0")).pid and view)
    assert after.incarnation == before.incarnation + 1
    assert after.pid != before.pid
    assert not psutil.pid_exists(before.pid)
    assert member(cluster, "prefill-0") == other


def test_a_killed_gateway_comes_back_on_the_same_port_and_hears_everybody(
    cluster: Cluster, member: Find, heard: Heard, until: Until
) -> None:
    url, before = cluster.url, member(cluster, "gateway")
    cluster.kill_instance("gateway")
    until(lambda: (view := member(cluster, "gateway")).incarnation > before.incarnation and view.pid)
    assert cluster.url == url
    until(lambda: set(heard(cluster)) == {"prefill-0", "decode-0"})


def test_a_stopped_process_is_found_out_killed_and_replaced(cluster: Cluster, member: Find, until: Until) -> None:
    before = member(cluster, "prefill-0")
    assert before.pid is not None
    os.kill(before.pid, signal.SIGSTOP)
    after = until(lambda: (view := member(cluster, "prefill-0")).incarnation > before.incarnation and view.pid and view)
    assert "no answer for" in after.reason
    until(lambda: not psutil.pid_exists(before.pid))


def test_a_port_in_use_is_known_before_ray_is_started(
    cluster: Cluster, configure: Callable[..., ClusterConfig], fakes: dict[str, Any]
) -> None:
    port = int(cluster.url.rpartition(":")[2])
    other = Cluster(configure({"role": "mixed"}, gateway={"port": port}), **fakes)
    with pytest.raises(PortInUse, match=str(port)):
        other.start()
    assert other.seconds == {}
