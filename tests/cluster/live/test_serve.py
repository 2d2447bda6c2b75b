"""`serve` as a process of its own, ended by signals as an operator would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from core.config import ClusterConfig

ROOT = Path(__file__).parents[3]
FAKES = Path(__file__).parents[1] / "fakes"

PROGRAM = """
import json, sys
from cluster.controller import Factories
from cluster.launch import serve
from core.config import parse_config
from rich.console import Console

serve(
    parse_config(json.loads(sys.argv[1])),
    console=Console(file=sys.stdout, width=200),
    python_path=[sys.argv[2]],
    factories=Factories(gateway="fake_gateway:FakeGateway"),
)
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[[ClusterConfig], subprocess.Popen[str]]:
    def run(config: ClusterConfig) -> subprocess.Popen[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM), config.model_dump_json(), str(FAKES)],
            cwd=ROOT,
            env=environment | {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return run


def _read_until(process: subprocess.Popen[str], words: str) -> list[str]:
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if words in line:
            return lines
    raise AssertionError("it ended without saying so:\n" + "".join(lines))


def test_sigterm_drains_and_leaves_nothing_running(
    start: Callable[[ClusterConfig], subprocess.Popen[str]], configure: Callable[..., ClusterConfig], tmp_path: Path
) -> None:
    word = tmp_path / "drained"
    gateway = {"port": 0, "served_model_name": str(word)}
    process = start(configure({"role": "mixed"}, gateway=gateway, health={"drain_timeout_s": 9.0}))
    try:
        shown = "".join(_read_until(process, "Serving "))
        assert "Started in" in shown
        assert "mixed-0" in shown
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in family)
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
        assert "Stopped." in rest
        assert word.read_text() == "drained 9\n"
        assert [child for child in family if child.is_running()] == []
    finally:
        process.kill()
        process.wait()


def test_sigint_while_starting_ends_the_start_and_leaves_nothing_running(
    start: Callable[[ClusterConfig], subprocess.Popen[str]], configure: Callable[..., ClusterConfig]
) -> None:
    process = start(configure({"role": "mixed"}))
    try:
        _read_until(process, "gateway: starting")
        family = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in child.name() for child in family)
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, rest
        assert "Stopped while starting." in rest
        assert [child for child in family if child.is_running()] == []
    finally:
        process.kill()
        process.wait()


def test_a_launcher_that_is_killed_takes_what_serves_with_it(
    start: Callable[[ClusterConfig], subprocess.Popen[str]], configure: Callable[..., ClusterConfig], until: Callable[..., Any]
) -> None:
    """All but two small agents of Ray's own, which take their time to notice."""
    process = start(configure({"role": "mixed"}))
    family: list[psutil.Process] = []
    try:
        _read_until(process, "Serving ")
        family = psutil.Process(process.pid).children(recursive=True)
        serving = [child for child in family if "Agent" not in _title(child)]
        titles = " ".join(_title(child) for child in serving)
        assert "ray::EngineActor" in titles
        assert "ray::GatewayActor" in titles
        process.kill()
        process.wait()
        until(lambda: not [child for child in serving if _runs(child)])
    finally:
        for child in family:
            if _runs(child):
                child.kill()
        process.kill()
        process.wait()


def _runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""
