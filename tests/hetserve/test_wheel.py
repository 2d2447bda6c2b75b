"""The wheel, built and installed apart: one name at the top, and a client that works without the server's packages."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)], cwd=REPO)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)])
    return target


def run(command: list[str], cwd: Path | None = None, path: Path | None = None) -> str:
    environment = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"} | ({"PYTHONPATH": str(path)} if path else {})
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_only_one_name_reaches_site_packages(installed: Path) -> None:
    names = {path.name for path in installed.iterdir() if path.name != "bin" and not path.name.endswith(".dist-info")}
    assert names == {"hetserve"}
    assert (installed / "hetserve" / "py.typed").is_file()


def test_every_server_file_travels_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name.removeprefix("hetserve/_app/") for name in names if name.startswith("hetserve/_app/")}
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    folders = {name.partition("/")[0] for name in packed}
    tracked = {name for name in listed.stdout.split() if name.partition("/")[0] in folders and (REPO / name).exists()}
    layers = {"core", "mail", "engine", "kv_transfer", "router", "prefill", "decode", "tooling", "gateway", "instance", "cluster"}
    assert layers == folders
    assert tracked <= packed
    assert not [name for name in names if name.endswith((".pyc", ".so")) or name.startswith(("tests", "benchmarks"))]


def test_the_installed_command_and_client_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    python = [sys.executable, "-P"]
    said = run([*python, "-c", "import hetserve; print(hetserve.__file__, hetserve.Client.__name__)"], tmp_path, installed)
    assert said.split() == [str(installed / "hetserve" / "__init__.py"), "Client"]
    assert "demo" in run([*python, "-m", "hetserve", "--help"], tmp_path, installed)
    code = "from hetserve._app_path import use_app; print(use_app()); import core.config as c; print(c.__file__)"
    found = run([*python, "-c", code], tmp_path, installed)
    assert found.split() == [str(installed / "hetserve" / "_app"), str(installed / "hetserve" / "_app" / "core" / "config.py")]
