from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from cluster.own_processes import OwnProcesses
from cluster.ray_session import RaySession, prepare_local, ray_address
from core.errors import LaunchError


def test_a_local_ray_gets_a_token_of_its_own_and_stays_on_loopback() -> None:
    one: dict[str, str] = {}
    two: dict[str, str] = {}
    prepare_local(one)
    prepare_local(two)
    assert one["RAY_AUTH_MODE"] == "token"
    assert len(one["RAY_AUTH_TOKEN"]) >= 32
    assert one["RAY_AUTH_TOKEN"] != two["RAY_AUTH_TOKEN"]
    assert one["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert one["RAY_USAGE_STATS_ENABLED"] == "0"


def test_what_the_user_set_stays() -> None:
    environment = {"RAY_AUTH_MODE": "disabled"}
    prepare_local(environment)
    assert environment["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in environment


def test_the_address_comes_from_the_environment_and_an_empty_one_is_none() -> None:
    assert ray_address({"RAY_ADDRESS": "10.0.0.1:6379"}) == "10.0.0.1:6379"
    assert ray_address({"RAY_ADDRESS": ""}) is None
    assert ray_address({}) is None


def test_a_cluster_that_is_not_there_is_an_error_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(LaunchError, match=f"cannot be reached at 127.0.0.1:{port}"):
        RaySession.open(f"127.0.0.1:{port}")


def test_own_processes_ends_what_was_started_since_and_nobody_else() -> None:
    stubborn = [sys.executable, "-c", "import signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"]
    elder = subprocess.Popen(stubborn)
    try:
        processes = OwnProcesses()
        child = subprocess.Popen(stubborn)
        processes.note()
        assert processes.end(patience_s=0.0) == [child.pid]
        assert child.wait(timeout=10) != 0
        assert elder.poll() is None
    finally:
        elder.kill()
        elder.wait()
