"""The wheel, built and installed apart: one name at the top, and a client that works without the server's packages."""

from __future__ import annotations

import subprocess
import sys
import tarfile
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


def model_files() -> set[str]:
    """What git tracks of the models, or all that is there where this is no checkout."""
    listed = subprocess.run(["git", "ls-files", "hetserve/models"], cwd=REPO, capture_output=True, text=True)
    there = {str(path.relative_to(REPO)) for path in (REPO / "hetserve" / "models").rglob("*") if path.is_file()}
    return set(listed.stdout.split()) if listed.returncode == 0 else {name for name in there if "__pycache__" not in name}


def test_the_models_travel_in_the_wheel_and_in_the_sdist(wheel: Path, tmp_path: Path) -> None:
    run([sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)], cwd=REPO)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        in_sdist = {name.partition("/")[2] for name in packed.getnames()}
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    needed = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    needed += ("chat_template.jinja", "README.md", "LICENSE")
    wanted = {f"hetserve/models/{model}/{name}" for model in ("demo", "demo-draft") for name in needed} | model_files()
    assert wanted <= in_wheel
    assert wanted <= in_sdist


def test_the_models_are_small() -> None:
    assert sum((REPO / name).stat().st_size for name in model_files()) <= 16_000_000


def test_an_installed_server_finds_the_model_that_came_with_it(installed: Path, tmp_path: Path) -> None:
    code = "from hetserve._app_path import use_app; use_app(); import instance.embedded as e; print(e.embedded_folder('demo'))"
    found = run([sys.executable, "-P", "-c", code], tmp_path, installed)
    assert found.split() == [str(installed / "hetserve" / "models" / "demo")]
    code = "import hetserve.models as m; print(m.DEMO, (m.DEMO_DRAFT / 'model.safetensors').is_file())"
    assert run([sys.executable, "-P", "-c", code], tmp_path, installed).split()[-1] == "True"


def test_the_installed_command_and_client_run_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    python = [sys.executable, "-P"]
    said = run([*python, "-c", "import hetserve; print(hetserve.__file__, hetserve.Client.__name__)"], tmp_path, installed)
    assert said.split() == [str(installed / "hetserve" / "__init__.py"), "Client"]
    assert "demo" in run([*python, "-m", "hetserve", "--help"], tmp_path, installed)
    code = "from hetserve._app_path import use_app; print(use_app()); import core.config as c; print(c.__file__)"
    found = run([*python, "-c", code], tmp_path, installed)
    assert found.split() == [str(installed / "hetserve" / "_app"), str(installed / "hetserve" / "_app" / "core" / "config.py")]
