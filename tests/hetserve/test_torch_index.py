"""Which build of torch `make` installs, and that finding it out cannot hold it up."""

from __future__ import annotations

import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.torch_index import CPU_INDEX, answers_in_time, choose, has_nvidia_driver
from tests.hetserve.fake_server import serving

REPO = Path(__file__).parents[2]


def test_the_cpu_build_is_taken_where_there_is_no_driver_and_its_index_answers() -> None:
    asked: list[str] = []

    def answers(index: str) -> bool:
        asked.append(index)
        return index == CPU_INDEX

    index, said = choose(lambda: False, answers)
    assert (index, asked) == (CPU_INDEX, [CPU_INDEX])
    assert "make TORCH_INDEX=" in said


def test_an_index_that_does_not_answer_is_left_out_and_it_says_so() -> None:
    index, said = choose(lambda: False, lambda _: False)
    assert index == ""
    assert "does not answer" in said
    assert "\n" not in said


def test_with_a_driver_nothing_is_asked() -> None:
    assert choose(lambda: True, lambda _: pytest.fail("asked")) == ("", "")


@pytest.mark.parametrize("name", ["proc/driver/nvidia/version", "dev/nvidiactl"])
def test_a_driver_is_known_by_its_files(tmp_path: Path, name: str) -> None:
    assert not has_nvidia_driver(tmp_path, "no-such-command")
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).touch()
    assert has_nvidia_driver(tmp_path, "no-such-command")


@pytest.mark.parametrize(("status", "found"), [(0, True), (9, False)])
def test_a_driver_is_known_by_its_tool_if_that_runs(tmp_path: Path, status: int, found: bool) -> None:
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\nexit {status}\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    assert has_nvidia_driver(tmp_path, str(tool)) is found


@pytest.fixture
def silent() -> Iterator[str]:
    """A server that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def test_an_index_is_asked_for_torch(silent: str) -> None:
    with serving(lambda x: x.answer(200 if x.path == "/whl/torch/" else 404, b"")) as server:
        assert answers_in_time(f"{server.url}/whl", 30.0)
        assert not answers_in_time(f"{server.url}/other", 30.0)
        gone = server.url
    assert not answers_in_time(gone, 30.0)
    assert not answers_in_time(silent, 0.2)
    assert not answers_in_time("nonsense", 30.0)


def installs(tmp_path: Path, *overrides: str, **environment: str) -> str:
    """The line by which `make` would install what the lock names."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    tool = tmp_path / "nvidia-smi"  # a machine with a driver: nothing is looked up
    tool.write_text("#!/bin/sh\nexit 0\n")
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    variables = {name: value for name, value in os.environ.items() if name not in ("TORCH_INDEX", "MAKEFLAGS", "MAKELEVEL")}
    variables |= {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", **environment}
    command = ["make", "--no-print-directory", "-n", "setup", f"VENV={tmp_path / 'none'}", *overrides]
    done = subprocess.run(command, cwd=REPO, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "requirements.lock" in line and "pip install" in line)
    return line


def test_make_takes_pips_own_index_where_there_is_a_driver(tmp_path: Path) -> None:
    assert "--extra-index-url" not in installs(tmp_path)


def test_a_flag_or_a_variable_overrides(tmp_path: Path) -> None:
    assert "--extra-index-url http://x/y " in installs(tmp_path, "TORCH_INDEX=http://x/y")
    assert "--extra-index-url http://x/y " in installs(tmp_path, TORCH_INDEX="http://x/y")
    assert "--extra-index-url" not in installs(tmp_path, "TORCH_INDEX=", TORCH_INDEX="http://x/y")
