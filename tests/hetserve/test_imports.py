"""What `import hetserve` costs, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hetserve._app_path import ServerMissing, app_path

SERVER = ("torch", "ray", "pydantic", "transformers", "numpy", "zmq", "msgspec", "core", "cluster", "gateway", "engine")


def loaded_by(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_the_client_needs_httpx_alone() -> None:
    loaded = loaded_by("import hetserve")
    assert "httpx" in loaded
    assert loaded.isdisjoint({*SERVER, "typer"})


def test_the_command_line_loads_nothing_of_the_server() -> None:
    loaded = loaded_by("import hetserve.cli")
    assert "typer" in loaded
    assert loaded.isdisjoint(SERVER)


def test_in_a_checkout_the_servers_folders_are_beside_the_package() -> None:
    assert (app_path() / "core" / "config.py").is_file()


def test_in_a_wheel_the_servers_folders_are_inside_the_package(tmp_path: Path) -> None:
    package = tmp_path / "hetserve"
    for folder in ("core", "cluster"):
        (package / "_app" / folder).mkdir(parents=True)
    (package / "_app" / "core" / "config.py").touch()
    (package / "_app" / "cluster" / "__init__.py").touch()
    assert app_path(package) == package / "_app"


def test_an_installation_without_them_says_so(tmp_path: Path) -> None:
    with pytest.raises(ServerMissing, match="server's folders"):
        app_path(tmp_path / "hetserve")
