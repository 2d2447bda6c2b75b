"""Where the server's folders (`core`, `engine`, `cluster`, ...) are, and putting them on the path.

In a checkout they lie beside this package; in a wheel they travel inside it, under `_app`, so that their general names
never get into a user's site-packages. Only commands call this: `import hetserve` alone leaves the path as it was.
"""

from __future__ import annotations

import sys
from pathlib import Path


class ServerMissing(Exception):
    """This installation cannot serve: the `server` extra, or the folders themselves, are not there."""


def app_path(package: Path | None = None) -> Path:
    """The folder to put on `sys.path`. `package` is this package's own folder, for tests. Raises ServerMissing."""
    package = package or Path(__file__).resolve().parent
    for folder in (package / "_app", package.parent):
        if (folder / "core" / "config.py").is_file() and (folder / "cluster" / "__init__.py").is_file():
            return folder
    raise ServerMissing(f"the server's folders are neither in {package / '_app'} nor beside {package}")


def use_app() -> Path:
    """Make the server's folders importable in this process; `cluster` sees to those it starts. Raises ServerMissing."""
    folder = app_path()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return folder
