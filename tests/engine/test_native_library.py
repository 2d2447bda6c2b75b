"""Compiling at first use: the cache, its key, and what happens when compiling cannot work."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.native_library import NativeBuildError, build, load

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HETSERVE_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.cpp"
    path.write_text('#include "answer.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return ANSWER; }\n')
    return path


def test_builds_once_and_loads(source: Path) -> None:
    library = build(source)
    built = library.stat().st_mtime_ns
    assert build(source) == library
    assert library.stat().st_mtime_ns == built
    assert load(source).answer() == 42


def test_a_change_of_a_header_or_a_flag_makes_another_library(source: Path) -> None:
    first = build(source)
    assert build(source, ("-O0", "-fPIC", "-shared")) != first
    source.with_name("answer.h").write_text("#define ANSWER 43\n")
    assert build(source) != first


def test_builders_that_race_leave_one_whole_library(source: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        libraries = set(pool.map(lambda _: build(source), range(4)))
    assert len(libraries) == 1
    assert libraries.pop().exists()
    assert [path.suffix for path in (source.parent / "cache").iterdir()] == [".so"]


def test_a_compiler_error_is_reported_and_leaves_nothing_behind(source: Path) -> None:
    source.write_text("int broken(")
    with pytest.raises(NativeBuildError, match="broken"):
        build(source)
    assert list((source.parent / "cache").iterdir()) == []


def test_an_unwritable_cache_is_reported(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HETSERVE_CACHE_DIR", str(source / "below-a-file"))
    with pytest.raises(NativeBuildError, match="cannot write"):
        build(source)
