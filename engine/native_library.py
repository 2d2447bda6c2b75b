"""C++ kernels of the engine, compiled where they run.

A kernel is one C++ file with a plain C interface. It is compiled with the machine's own compiler the first time that it is
needed, so it uses exactly this processor's instructions, and kept in the user's cache folder under a hash of everything the
result depends on: source, compiler version, flags and processor. Processes may race to build the same library: each writes a
file of its own and renames it into place, so a reader sees a whole library or none.

Load a library after `import torch`: both then run on one OpenMP thread pool (the same `libgomp.so.1`), and two pools do not
fight for the cores.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

FLAGS = ("-O3", "-march=native", "-fopenmp", "-std=c++17", "-fPIC", "-shared", "-fno-math-errno", "-fvisibility=hidden")
BUILD_TIMEOUT_S = 120.0


class NativeBuildError(RuntimeError):
    """No usable compiler on this machine, or it rejected the source; the message says which."""


def cache_dir() -> Path:
    """Where compiled kernels are kept: `$HETSERVE_CACHE_DIR`, else `hetserve` in the user's cache folder."""
    chosen = os.environ.get("HETSERVE_CACHE_DIR")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hetserve"


def build(source: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compile `source` unless the cache already holds it, and return the path of the shared library.

    Raises:
        NativeBuildError: there is no C++ compiler, or compiling failed.
    """
    compiler = _compiler()
    digest = hashlib.sha256()
    for part in (*_texts(source), _version(compiler), *flags, _processor()):
        digest.update(part.encode() + b"\0")
    library = cache_dir() / f"{source.stem}-{digest.hexdigest()[:20]}.so"
    if library.exists():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(suffix=".so", prefix=f"{source.stem}-", dir=library.parent)
    except OSError as error:
        raise NativeBuildError(f"cannot write compiled kernels to {library.parent}: {error}") from error
    os.close(handle)
    try:
        _run([compiler, *flags, str(source), "-o", scratch])
        os.chmod(scratch, 0o755)
        os.replace(scratch, library)
    finally:
        Path(scratch).unlink(missing_ok=True)
    return library


@cache
def load(source: Path) -> ctypes.CDLL:
    """Build `source` if need be and load it, once per process.

    Raises:
        NativeBuildError: it cannot be compiled here, or the result cannot be loaded.
    """
    library = build(source)
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise NativeBuildError(f"cannot load {library}: {error}") from error


def _texts(source: Path) -> list[str]:
    """The text of `source` and of the headers beside it that it includes."""
    text = source.read_text()
    headers = [source.with_name(name) for name in re.findall(r'^#include "(.+)"$', text, re.MULTILINE)]
    return [text, *(part for header in headers for part in _texts(header))]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NativeBuildError("no C++ compiler on PATH (tried $CXX, c++, g++, clang++)")


@cache
def _version(compiler: str) -> str:
    return _run([compiler, "--version"])


def _processor() -> str:
    """Text that changes when `-march=native` would: the processor's feature flags, else its name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"cannot run {command[0]}: {error}") from error
    if done.returncode != 0:
        raise NativeBuildError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip()[-2000:]}")
    return done.stdout
