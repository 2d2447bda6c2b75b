"""`hetserve demo` as a person runs it: it talks, a process dies in the middle of an answer, and nothing is left running."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import uuid
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
MARK = "HETSERVE_TEST_MARK"


def left_running(mark: str) -> list[str]:
    """Processes that inherited the mark."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(f"{process.pid} {' '.join(process.cmdline())}")
        except psutil.Error:
            continue
    return found


def run(*arguments: str, typed: str | None = None) -> tuple[int, str, str]:
    """Exit code, output and errors of a command; asserts that none of its processes outlived it."""
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {MARK: mark, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    command = [sys.executable, "-m", "hetserve", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, input=typed, capture_output=True, text=True, timeout=150)
    assert left_running(mark) == []
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("random", [False, True], ids=["in words", "random weights"])
def test_the_killed_answer_is_the_unfailed_one_and_nothing_is_left(random: bool, tmp_path: Path) -> None:
    picture = tmp_path / "demo.svg"
    flags = ("--size", "tiny", "--folder", str(tmp_path)) if random else ()
    code, out, err = run("demo", "--transcript", str(picture), *flags)
    assert code == 0, out + err
    flat = " ".join(out.split())
    told = re.search(r"(decode-\d) \(process \d+\) was ended by SIGKILL when (\d+) of (\d+) tokens had come\.", flat)
    assert told is not None, out
    victim, after, total = told[1], int(told[2]), int(told[3])
    assert 0 < after < total
    (other,) = {"decode-0", "decode-1"} - {victim}
    assert f"{other} took over, at attempt 2. All {total} tokens equal those of the answer that nobody disturbed." in flat
    assert f"⟨{victim} killed⟩" in out
    assert "Nothing was left running." in flat
    assert err == ""
    assert "(raylet)" not in out
    assert "SIGKILL" in picture.read_text()


def test_a_chat_without_a_server_starts_the_model_and_stops_it() -> None:
    code, out, err = run("chat", "--max-tokens", "16", "--temperature", "0", typed="Hello!\n/reset\nHello!\n")
    assert code == 0, out + err
    first, second = out.splitlines()
    assert first
    assert first == second
    assert "Ready" in err or "ready" in err


def test_serving_a_model_whose_weights_are_gone_is_one_line(tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text('{"architectures": ["LlamaForCausalLM"]}')
    code, _, err = run("demo", "--model", str(tmp_path))
    assert code == 1
    assert err.count("\n") == 1
    assert "has no weights" in err
