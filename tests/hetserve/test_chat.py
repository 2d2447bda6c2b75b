"""`hetserve chat` against a scripted server: what it sends, what it shows, and what it survives."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from hetserve import cli
from hetserve.conversation import Conversation
from tests.hetserve.fake_server import Exchange, FakeServer, serving

Script = Callable[[Exchange], None]


def say(x: Exchange, *pieces: str, done: bool = True) -> None:
    x.begin_stream()
    for piece in pieces:
        x.event({"id": "c", "created": 1, "model": "m", "choices": [{"index": 0, "delta": {"content": piece}}]})
    if done:
        x.event("[DONE]")


def model(answer: Script) -> Script:
    def script(x: Exchange) -> None:
        if x.path == "/v1/models":
            x.answer(body={"data": [{"id": "m"}]})
        else:
            assert x.path == "/v1/chat/completions"
            answer(x)

    return script


def counting(x: Exchange) -> None:
    """Says how many messages it was sent."""
    say(x, "turn ", str(len(x.json()["messages"])))


def chat(answer: Script, typed: str, *arguments: str) -> tuple[int, str, str, list[dict[str, Any]]]:
    with serving(model(answer)) as server:
        result = CliRunner().invoke(cli.app, ["chat", "--url", server.url, *arguments], input=typed)
        return result.exit_code, result.stdout, result.stderr, bodies(server)


def bodies(server: FakeServer) -> list[dict[str, Any]]:
    return [x.json() for x in server.seen if x.path != "/v1/models"]


def contents(body: dict[str, Any]) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in body["messages"]]


def test_every_line_is_a_question_and_the_conversation_goes_on() -> None:
    code, out, err, sent = chat(counting, "hello\n\nagain\n")
    assert (code, out, err) == (0, "turn 1\nturn 3\n", "")
    assert contents(sent[1]) == [("user", "hello"), ("assistant", "turn 1"), ("user", "again")]


def test_what_was_asked_for_is_sent_and_the_rest_is_the_servers_choice() -> None:
    flags = ("--system", "Be brief.", "--model", "big", "--max-tokens", "7", "--temperature", "0", "--seed", "3")
    _, _, _, (body,) = chat(counting, "hello\n", *flags)
    assert contents(body) == [("system", "Be brief."), ("user", "hello")]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("big", 7, 0, 3)
    _, _, _, (body,) = chat(counting, "hello\n")
    assert body["model"] == "m"
    assert {"temperature", "seed"}.isdisjoint(body)


def test_reset_forgets_all_but_the_system_and_quit_ends_it() -> None:
    code, out, err, sent = chat(counting, "hello\n/reset\n/help\nagain\n/quit\nnever\n", "--system", "s")
    assert (code, out) == (0, "turn 2\nturn 2\n")
    assert contents(sent[1]) == [("system", "s"), ("user", "again")]
    assert "Forgotten." in err
    assert "/quit or Ctrl-D ends it" in err


def test_an_error_is_one_line_and_the_chat_goes_on_without_that_question() -> None:
    def refusing(x: Exchange) -> None:
        if x.json()["messages"][-1]["content"] == "bad":
            x.answer(400, {"error": {"message": "no\nsuch thing", "code": "nope"}})
        else:
            counting(x)

    code, out, err, _ = chat(refusing, "hello\nbad\nagain\n")
    assert (code, out) == (0, "turn 1\nturn 3\n")
    assert err == "BadRequest: 400: no such thing\n"


def test_an_answer_that_breaks_off_is_kept_as_far_as_it_came() -> None:
    def breaking(x: Exchange) -> None:
        if len(x.json()["messages"]) == 1:
            say(x, "half an ans", done=False)
        else:
            counting(x)

    code, out, err, sent = chat(breaking, "hello\nagain\n")
    assert (code, out) == (0, "half an ans\nturn 3\n")
    assert err.startswith("StreamError: ")
    assert contents(sent[1])[1] == ("assistant", "half an ans")


def test_the_oldest_turns_are_forgotten_when_the_context_is_full_and_it_says_so() -> None:
    def narrow(x: Exchange) -> None:
        if len(x.json()["messages"]) > 4:
            x.answer(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
        else:
            counting(x)

    code, out, err, sent = chat(narrow, "a\nb\nc\n", "--system", "s")
    assert (code, out) == (0, "turn 2\nturn 4\nturn 4\n")
    assert err.count("The context is full: the oldest question and its answer are forgotten.") == 1
    assert contents(sent[-1]) == [("system", "s"), ("user", "b"), ("assistant", "turn 4"), ("user", "c")]


def test_a_question_that_never_fits_is_an_error_and_forgets_what_was_in_its_way() -> None:
    def full(x: Exchange) -> None:
        if x.json()["messages"][-1]["content"] == "long":
            x.answer(400, {"error": {"message": "too long", "code": "context_length_exceeded"}})
        else:
            counting(x)

    code, out, err, _ = chat(full, "a\nlong\nb\n")
    assert (code, out) == (0, "turn 1\nturn 1\n")
    assert err.splitlines()[-1] == "BadRequest: 400: too long"


def test_ctrl_c_ends_an_answer_and_not_the_chat() -> None:
    hung_up: list[bool] = []

    def interrupting(x: Exchange) -> None:
        if x.json()["messages"][-1]["content"] == "hello":
            say(x, "this is never", done=False)
            os.kill(os.getpid(), signal.SIGINT)
            hung_up.append(x.wait_hang_up())
        else:
            counting(x)

    code, out, err, sent = chat(interrupting, "hello\nagain\n")
    assert code == 0
    assert out.endswith(("turn 3\n", "turn 1\n"))  # the signal may come before the words
    assert "Interrupted." in err
    assert hung_up == [True]
    assert len(sent) == 2


def test_sigterm_ends_the_chat() -> None:
    def ending(x: Exchange) -> None:
        x.begin_stream()
        os.kill(os.getpid(), signal.SIGTERM)
        x.wait_hang_up()

    code, _, _, sent = chat(ending, "hello\nagain\n")
    assert code == 130
    assert len(sent) == 1


def test_control_characters_of_a_model_do_not_reach_the_terminal() -> None:
    _, out, _, _ = chat(lambda x: say(x, "a\x1b[2J"), "hello\n")
    assert out == "a\N{REPLACEMENT CHARACTER}[2J\n"


def test_a_server_that_is_not_there_is_one_line_for_each_question() -> None:
    with serving(counting) as server:
        url = server.url
    result = CliRunner().invoke(cli.app, ["chat", "--url", url, "--model", "m"], input="hello\n")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.startswith("ConnectionFailed: ")
    assert result.stderr.count("\n") == 1


def test_a_conversation_with_one_open_question_has_nothing_to_forget() -> None:
    conversation = Conversation("s")
    conversation.ask("a")
    assert not conversation.forget_oldest()
    conversation.answered("b")
    conversation.ask("c")
    assert conversation.forget_oldest()
    conversation.withdraw()
    assert conversation.messages == ({"role": "system", "content": "s"},)


@pytest.mark.parametrize("flag", [("--max-tokens", "0"), ("--temperature", "-1"), ("--seed", "-1")])
def test_nonsense_is_refused(flag: tuple[str, str]) -> None:
    code, _, _, sent = chat(counting, "hello\n", *flag)
    assert (code, sent) == (2, [])
