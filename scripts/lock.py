"""Writes `requirements.lock`: every package that the server and its tests need, at the version this environment has.

    python scripts/lock.py > requirements.lock

Follows the requirements of `pyproject.toml` (with the extras `server` and `dev`, and what the build needs) through the
metadata of what is installed, so that tools which merely happen to lie around stay out. Local versions are cut off
(`torch==2.13.0`, not `2.13.0+cpu`): which build of torch is installed is the package index's business.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement

EXTRAS = ("server", "dev")
HEADER = """\
# Everything that the server and its tests run on, pinned. Written by `make lock`; do not edit.
#
#     pip install -r requirements.lock
#     pip install --no-deps --no-build-isolation -e .
#
# torch comes in the build that the package index offers: PyPI's needs CUDA's libraries (gigabytes); for the CPU's, add
# PyTorch's own index: --extra-index-url https://download.pytorch.org/whl/cpu
"""


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def closure(wanted: Iterable[Requirement]) -> dict[str, str]:
    """Name to version of everything that `wanted` leads to, extras and environment markers considered.

    Raises:
        PackageNotFoundError: something needed is not installed.
    """
    found: dict[str, str] = {}
    done: set[tuple[str, str]] = set()
    todo = list(wanted)
    while todo:
        requirement = todo.pop()
        name = canonical(requirement.name)
        installed = distribution(name)
        if not requirement.specifier.contains(installed.version, prereleases=True):
            raise SystemExit(f"{requirement} is needed, but {installed.version} is installed")
        found[name] = installed.version.partition("+")[0]
        for extra in ("", *sorted(requirement.extras)):
            if (name, extra) in done:
                continue
            done.add((name, extra))
            needed = map(Requirement, installed.requires or ())
            todo += [item for item in needed if item.marker is None or item.marker.evaluate({"extra": extra})]
    return found


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
    wanted = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for extra in EXTRAS:
        wanted += project["project"]["optional-dependencies"][extra]
    try:
        pins = closure(map(Requirement, wanted))
    except PackageNotFoundError as error:
        raise SystemExit(f"{error.name} is needed but not installed") from error
    sys.stdout.write(HEADER + "".join(f"{name}=={version}\n" for name, version in sorted(pins.items())))


if __name__ == "__main__":
    main()
