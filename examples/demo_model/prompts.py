"""The twenty prompts whose greedy answers go with every trained model: fixed, so that runs can be compared."""

from __future__ import annotations

from dataclasses import dataclass

from examples.demo_model.corpus import Message

MAX_NEW_TOKENS = 64


@dataclass(frozen=True)
class Prompt:
    """A chat to answer, or a text to go on with; `kind` as the corpus calls it."""

    kind: str
    messages: tuple[Message, ...] = ()
    text: str = ""


def _chat(kind: str, *turns: str, system: str | None = None) -> Prompt:
    """Turns of user and assistant, the user first and last."""
    before = () if system is None else (Message("system", system),)
    said = tuple(Message("assistant" if at % 2 else "user", turn) for at, turn in enumerate(turns))
    return Prompt(kind, before + said)


PROMPTS = (
    _chat("dialogue", "Hello!"),
    _chat("dialogue", "Who are you?", system="You are a helpful assistant."),
    _chat("hetserve", "What is prefill?"),
    _chat("hetserve", "What does a KV cache hold?"),
    _chat("hetserve", "What happens when a worker dies?"),
    _chat("hetserve", "Why are prefill and decode separated?"),
    _chat("arithmetic", "What is 17 + 25?"),
    _chat("arithmetic", "What is 9 times 6?"),
    _chat("arithmetic", "What is 2 + 3?", "2 + 3 = 5.", "What is 48 - 19?"),
    _chat("counting", "Count from 7 to 15."),
    _chat("list", "List three animals."),
    _chat("list", "Name four colours."),
    _chat("json", "Give me a JSON object with a name and an age."),
    _chat("story", "Tell me a story about a fox."),
    Prompt("story", text="Once upon a time, there was a little girl"),
    Prompt("story", text="One day, a dog found"),
    Prompt("story", text="The old man lived in a small house near the sea. Every morning"),
    Prompt("story", text="It was a cold night, and the cat"),
    Prompt("story", text="Anna and Tom were friends. They"),
    Prompt("counting", text="1, 2, 3, 4,"),
)
