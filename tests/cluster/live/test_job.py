"""`ray job submit --working-dir . -- <serve>`: the way onto a cluster that somebody else runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray.job_submission import JobStatus, JobSubmissionClient

from core.config import ClusterConfig

ROOT = Path(__file__).parents[3]
SOURCES = ("cluster", "core", "decode", "engine", "gateway", "kv_transfer", "prefill", "router")

ENTRYPOINT = """
import sys
from cluster.controller import Factories
from cluster.launch import serve
from core.config import load_config

serve(load_config(sys.argv[1]), python_path=["fakes"], factories=Factories(gateway="fake_gateway:FakeGateway"))
"""


def _free_ports(count: int) -> list[int]:
    servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [server.getsockname()[1] for server in servers]
    finally:
        for server in servers:
            server.close()


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """With a short name: Ray's Unix sockets lie deep inside, and their paths may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="hs-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture
def head(ray_folder: Path) -> Iterator[JobSubmissionClient]:
    """A Ray head on ports and a folder of its own, as `ray start` makes it."""
    port, dashboard, agent = _free_ports(3)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *(f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"),
        *("--dashboard-host=127.0.0.1", "--node-ip-address=127.0.0.1", "--num-cpus=2", "--object-store-memory=100000000"),
        f"--temp-dir={ray_folder}",
    ]
    environment |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    family: list[psutil.Process] = []
    try:
        yield _client(f"http://127.0.0.1:{dashboard}", process)
        family = psutil.Process(process.pid).children(recursive=True)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
        for left in psutil.wait_procs(family, timeout=5)[1]:
            left.kill()


def _client(url: str, head: subprocess.Popen[bytes]) -> JobSubmissionClient:
    until = _deadline(90)
    while until():
        try:
            return JobSubmissionClient(url)
        except ConnectionError:
            assert head.poll() is None, "the Ray head ended"
    raise AssertionError("the Ray head did not come up")


def _deadline(seconds: float) -> Callable[[], bool]:
    until_s = time.monotonic() + seconds

    def wait_a_moment() -> bool:
        time.sleep(0.2)
        return time.monotonic() < until_s

    return wait_a_moment


def test_a_submitted_job_serves_from_its_own_copy_of_the_sources_and_ends_when_stopped(
    head: JobSubmissionClient,
    configure: Callable[..., ClusterConfig],
    ray_folder: Path,
    tmp_path: Path,
    until: Callable[..., Any],
) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    for name in SOURCES:
        (folder / name).symlink_to(ROOT / name)
    (folder / "fakes").symlink_to(Path(__file__).parents[1] / "fakes")
    (folder / "entry.py").write_text(ENTRYPOINT)
    (port,) = _free_ports(1)
    config = configure({"role": "prefill"}, {"role": "decode"}, gateway={"port": port})
    (folder / "served.yaml").write_text(config.model_dump_json())

    job = head.submit_job(entrypoint=f"{sys.executable} entry.py served.yaml", runtime_env={"working_dir": str(folder)})

    def serving() -> bool:
        assert head.get_job_status(job) in (JobStatus.PENDING, JobStatus.RUNNING), head.get_job_logs(job)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/heard", timeout=2) as answer:
                return b"prefill-0" in (heard := answer.read()) and b"decode-0" in heard
        except OSError:
            return False

    until(serving, timeout_s=120)
    actors = [process for process in psutil.process_iter() if _serves_from(process, ray_folder)]
    assert len(actors) == 3
    until(lambda: "Serving " in head.get_job_logs(job))
    assert head.stop_job(job)
    until(lambda: head.get_job_status(job) is JobStatus.STOPPED)
    assert "Stopped." in head.get_job_logs(job)
    until(lambda: not [actor for actor in actors if actor.is_running()])


def _serves_from(process: psutil.Process, folder: Path) -> bool:
    try:
        title = "".join(process.cmdline()).strip()
        return title.startswith(("ray::EngineActor", "ray::GatewayActor")) and process.cwd().startswith(str(folder))
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False
