"""The examples are right: configurations parse, programs run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.config import load_config
from tests.hetserve.fake_server import Exchange, serving

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.name)
def test_configurations_are_valid(file: Path) -> None:
    assert load_config(file).pools


def answer(x: Exchange) -> None:
    if x.path == "/v1/models":
        x.answer(body={"data": [{"id": "m"}]})
        return
    head = {"id": "c", "created": 1, "model": "m"}
    if x.path == "/v1/completions":
        trace = {"prefill": "prefill-0", "decode": "decode-1"}
        x.answer(body={**head, "choices": [{"index": 0, "text": "a", "finish_reason": "length"}], "hetserve": trace})
        return
    x.begin_stream()
    x.event(
        {**head, "choices": [{"index": 0, "delta": {"content": f"turn {len(x.json()['messages'])}"}, "finish_reason": "stop"}]}
    )
    x.event("[DONE]")


def run(name: str, url: str, typed: str = "") -> str:
    command = [sys.executable, str(EXAMPLES / name), url]
    environment = {**os.environ, "PYTHONPATH": str(EXAMPLES.parent)}
    done = subprocess.run(command, input=typed, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_chat_keeps_the_conversation() -> None:
    with serving(answer) as server:
        out = run("chat.py", server.url, "hello\nagain\n")
    assert "turn 1" in out
    assert "turn 3" in out


def test_many_at_once_counts_who_served() -> None:
    with serving(answer) as server:
        assert run("many_at_once.py", server.url).strip() == "50 answers: prompt read by prefill-0, tokens written by decode-1"
