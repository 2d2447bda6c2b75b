"""The demo, but for the cluster: what it asks, what it accepts, whom it kills."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from typing import Any

import psutil
import pytest
from rich.console import Console

from hetserve import Client
from hetserve.commands.demo import Outcome
from hetserve.demo.ask import ask, ask_all
from hetserve.demo.drill import Drill
from hetserve.demo.report import Kill, Served, kill_problem, kill_story, pause_s, served_table, size
from hetserve.demo.script import Scene, at_random, in_words
from hetserve.demo.typist import Typist
from hetserve.parsing import requests, running
from hetserve.printable import printable
from hetserve.types import Trace
from tests.hetserve.fake_server import Exchange, serving, usage_chunk

PIECES = ("Hel", "lo ", "wo", "rld")


def trace_of(**fields: Any) -> dict[str, Any]:
    trace = {"id": "r", "prefill": "prefill-0", "decode": "decode-0", "local": False, "outcome": "completed", "kv_bytes": 2048}
    return {**trace, **fields}


def answer(x: Exchange, trace: dict[str, Any] | None) -> None:
    """Two tokens a piece."""
    assert x.headers["x-hetserve-trace"] == "1"
    assert x.json()["return_token_ids"]
    x.begin_stream()
    for index, text in enumerate(PIECES):
        choice = {"index": 0, "finish_reason": None, "token_ids": [2 * index, 2 * index + 1]}
        choice |= {"delta": {"content": text}} if x.path == "/v1/chat/completions" else {"text": text}
        x.event({"id": "c", "created": 1, "model": "demo", "choices": [choice]})
    x.event(usage_chunk(5, 8, hetserve=trace))
    x.event("[DONE]")


def quiet(width: int = 100) -> Console:
    return Console(file=StringIO(), width=width)


def asked(trace: dict[str, Any] | None, scenes: tuple[Scene, ...]) -> tuple[list[Served], list[dict[str, Any]]]:
    with serving(lambda x: answer(x, trace)) as server, Client(server.url) as client:
        served = ask_all(quiet(), client, scenes)
        return served, [x.json() for x in server.seen]


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", [in_words, at_random])
def test_disaggregated_answers_are_accepted(script: Any) -> None:
    scenes = script(0)
    served, _ = asked(trace_of(), scenes)
    assert [item.name for item in served] == [scene.name for scene in scenes]
    assert all(item.error is None and item.trace is not None and item.trace.kv_bytes == 2048 for item in served)
    assert all((item.text, item.token_ids) == ("Hello world", tuple(range(8))) for item in served)
    assert served_table(served).row_count == len(scenes)


@pytest.mark.parametrize("trace", [None, trace_of(local=True), trace_of(kv_bytes=0), trace_of(prefill="decode-0")])
def test_answers_that_were_not_disaggregated_fail(trace: dict[str, Any] | None) -> None:
    served, _ = asked(trace, at_random(0))
    assert all(item.error is not None for item in served)
    assert len(Outcome(served).problems) == len(served)


def test_a_conversation_keeps_what_was_said_and_others_begin_anew() -> None:
    _, bodies = asked(trace_of(), in_words(0))
    chats = [[message["role"] for message in body["messages"]] for body in bodies if "messages" in body]
    assert chats.count(["user", "assistant", "user"]) == 1
    assert chats.count(["user"]) == len(chats) - 1
    (followed,) = (body["messages"] for body in bodies if len(body.get("messages", ())) == 3)
    assert followed[1]["content"] == "Hello world"


def test_words_are_greedy_and_end_by_themselves_and_random_ones_have_their_length() -> None:
    assert all(scene.sampling["temperature"] == 0 and "ignore_eos" not in scene.sampling for scene in in_words(0))
    assert all(scene.sampling["ignore_eos"] for scene in at_random(0))
    assert {scene.sampling["max_tokens"] for scene in in_words(0, 7)} == {7}


# --- killing ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def drilled(pid: int | None, running_id: str = "req-1-0") -> tuple[Drill, Served, str]:
    def script(x: Exchange) -> None:
        if x.path == "/debug/requests":
            x.answer(body={"recent": [], "running": [trace_of(id="another-0", decode="decode-7"), trace_of(id=running_id)]})
        else:
            answer(x, trace_of(attempts=2, decode="decode-1"))

    console = quiet()
    with serving(script) as server, Client(server.url) as client:
        drill = Drill(client, {"decode-0": pid}.get, after_tokens=3)
        served = ask(console, client, at_random(0)[0], on_piece=drill)
    assert isinstance(console.file, StringIO)
    return drill, served, console.file.getvalue()


def test_the_process_that_writes_the_answer_is_killed_once_enough_of_it_has_come(child: subprocess.Popen[bytes]) -> None:
    drill, served, shown = drilled(child.pid)
    kill = drill.confirm()
    assert kill is not None
    assert (kill.victim, kill.pid, kill.after_tokens, kill.ended) == ("decode-0", child.pid, 4, True)
    assert not psutil.pid_exists(child.pid)
    assert "Hello ⟨decode-0 killed⟩world" in shown
    assert served.text == "Hello world"


def test_a_process_that_is_not_ours_is_never_killed(child: subprocess.Popen[bytes]) -> None:
    stranger = psutil.Process().parent()
    assert stranger is not None
    for pid in (stranger.pid, None):
        drill, _, _ = drilled(pid)
        assert drill.confirm() is None
    assert stranger.is_running()
    drill, _, _ = drilled(child.pid, running_id="another-1")
    assert drill.confirm() is None
    assert child.poll() is None


def killed(**changes: Any) -> Served:
    trace = Trace("r", "prefill-0", "decode-1", False, "completed", 2, 5, 4, 0, 2048, None, None)
    trace = replace(trace, attempts=changes.pop("attempts", 2))
    served = Served("story", "abcd", (1, 2, 3, 4), 5, 0.1, (1.0, 1.1, 1.2, 1.9, 2.0), trace)
    return replace(served, **changes)


KILL = Kill("decode-0", 77, at_s=1.15, after_tokens=2, ended=True)


def test_a_kill_that_nobody_could_tell_from_the_answer_is_told() -> None:
    assert kill_problem(KILL, killed(), killed(attempts=1)) is None
    story = kill_story(KILL, killed())
    assert "decode-0 (process 77) was ended by SIGKILL when 2 of 4 tokens had come" in story
    assert "paused for 0.70 s; decode-1 took over, at attempt 2" in story


@pytest.mark.parametrize(
    ("kill", "changes", "said"),
    [
        (None, {}, "over before its process could be killed"),
        (replace(KILL, ended=False), {}, "process 77 of decode-0 outlived SIGKILL"),
        (KILL, {"attempts": 1}, "the kill did not land"),
        (KILL, {"token_ids": (1, 2, 9, 4)}, "4 tokens and 4, alike up to 2"),
        (KILL, {"token_ids": (1, 2, 3)}, "3 tokens and 4, alike up to 3"),
        (KILL, {"text": "abxd"}, "not the one without a kill"),
        (KILL, {"error": "StreamError: gone"}, "StreamError: gone"),
    ],
)
def test_whatever_else_happens_fails(kill: Kill | None, changes: dict[str, Any], said: str) -> None:
    problem = kill_problem(kill, killed(**changes), killed(attempts=1))
    assert problem is not None
    assert said in problem
    outcome = Outcome([killed(attempts=1)], killed(**changes), kill)
    assert outcome.problems == [f"story: {problem}"]


def test_an_outcome_without_a_kill_or_with_a_process_left_over_fails() -> None:
    assert Outcome([killed()], killed(), KILL).problems == []
    assert Outcome([killed()], None, None).problems == ["nobody was killed"]
    left = Outcome([killed()], killed(), KILL, [psutil.Process()]).problems
    assert len(left) == 1
    assert left[0].startswith("still running: ")


def test_the_pause_is_the_longest_silence_that_ended_after_the_kill() -> None:
    assert pause_s((0.0, 5.0, 5.1, 6.0, 6.1), at_s=5.05) == pytest.approx(0.9)
    assert pause_s((0.0, 5.0), at_s=6.0) == 0.0


# --- showing ----------------------------------------------------------------------------------------------------------


def typed(width: int, *pieces: str) -> list[str]:
    console = quiet(width)
    typist = Typist(console)
    for piece in pieces:
        typist.write(piece)
    typist.end()
    assert isinstance(console.file, StringIO)
    return [line.rstrip() for line in console.file.getvalue().splitlines()]


def test_lines_end_between_words_however_the_pieces_fall() -> None:
    text = "one two three four  five\n\nsix " + "x" * 25 + " seven"
    expected = ["one two", "three four", "five", "", "six", "xxxxxxxxxx", "xxxxxxxxxx", "xxxxx", "seven"]
    assert typed(10, text) == typed(10, *text) == expected


def test_control_characters_are_kept_from_the_terminal() -> None:
    assert printable("a\x1b[2J\nb\u202e") == "a\N{REPLACEMENT CHARACTER}[2J\nb\N{REPLACEMENT CHARACTER}"
    assert "\x1b" not in "".join(typed(80, "a\x1b[2J"))


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (2_000_000, "2.0 MB"), (3e15, "3000.0 TB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert size(count) == text


def test_journal_entries_say_whether_they_were_disaggregated() -> None:
    journal = {"recent": [trace_of(), trace_of(local=True)], "running": [trace_of(id="now")]}
    assert [entry.disaggregated for entry in requests(journal)] == [True, False]
    assert [entry.id for entry in running(journal)] == ["now"]
