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
    _chat("talk", "Good morning!"),
    _chat("hetserve", "What is HetServe?", system="You are the demo of HetServe."),
    _chat("hetserve", "What is prefill?"),
    _chat("hetserve", "What does a KV cache hold?"),
    _chat("hetserve", "What happens when a worker dies?"),
    _chat("arithmetic", "What is 17 + 25?"),
    _chat("arithmetic", "What is 9 times 6?", "9 times 6 is 54.", "And what is 48 minus 19?"),
    _chat("counting", "Count from 7 to 15."),
    _chat("list", "List three animals."),
    _chat("json", "Give me a JSON object with a name, an age and a city."),
    _chat("everyday", "What colour is a lemon?", system="You are a pirate."),
    _chat("unknown", "Who is the president of France?"),
    _chat("dialogue", "My name is Ruth.", "Hello, Ruth! It is nice to meet you.", "What is my name?"),
    _chat("story", "Tell me a story about a fox and a violin."),
    Prompt("text", text="Once upon a time, there was a little goose"),
    Prompt("text", text="There was once a clever knight named Oskar"),
    Prompt("text", text="One frosty morning"),
    Prompt("text", text="The old clockmaker lived near the sea. Every evening"),
    Prompt("facts", text="A KV cache holds"),
    Prompt("facts", text="HetServe is LLM serving for"),
)
