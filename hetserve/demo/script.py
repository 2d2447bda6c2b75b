"""What the demo asks. Data alone.

The first scene is asked once more at the end, and the process that writes its answer is killed in the middle: it should be long.
"""

from __future__ import annotations

from dataclasses import dataclass

from hetserve.types import Message, SamplingOptions


@dataclass(frozen=True)
class Scene:
    """One thing to ask. `prompt` is text to go on with, or, where `chat`, the next question of the conversation, which begins
    anew unless the scene `follows` the one before it."""

    name: str
    prompt: str
    sampling: SamplingOptions
    chat: bool = False
    follows: bool = False
    system: str | None = None

    def messages(self, so_far: tuple[Message, ...]) -> tuple[Message, ...]:
        """The conversation to send, given what was said up to here."""
        begun = so_far if self.follows else ()
        if self.system is not None and not self.follows:
            begun = ({"role": "system", "content": self.system},)
        return (*begun, {"role": "user", "content": self.prompt})


def in_words(seed: int, max_tokens: int | None = None) -> tuple[Scene, ...]:
    """For the model that comes with HetServe: greedy, until it says that it has ended."""
    short: SamplingOptions = {"max_tokens": max_tokens or 160, "temperature": 0.0, "seed": seed, "return_token_ids": True}
    long: SamplingOptions = {**short, "max_tokens": max_tokens or 400}
    return (
        Scene("story", "Tell me a story about a fox and a lantern.", long, chat=True),
        Scene("chat", "What happens when a worker dies?", short, chat=True),
        Scene("chat, on", "And what is a KV cache?", short, chat=True, follows=True),
        Scene("sum", "What is 17 + 25?", short, chat=True),
        Scene("JSON", "Give me a JSON object with a name and an age.", short, chat=True),
        Scene("text", "Once upon a time, there was a little girl", {**short, "max_tokens": max_tokens or 96}),
    )


def at_random(seed: int, max_tokens: int | None = None) -> tuple[Scene, ...]:
    """For any other model, of random weights or real ones: as many tokens as asked for, so that speeds can be compared."""
    tokens = max_tokens or 48
    short: SamplingOptions = {
        "max_tokens": tokens,
        "temperature": 0.8,
        "seed": seed,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    return (
        Scene(
            "text 1",
            "Once upon a time, in a harbour at the edge of the map, a keeper of the light wrote down every ship that passed.",
            {**short, "max_tokens": max(tokens, 160)},
        ),
        Scene("text 2", "List three reasons why reading a prompt and writing an answer suit different processors:", short),
        Scene("text 3", "def fibonacci(n: int) -> int:\n    ", short),
        Scene(
            "chat",
            "What does a key-value cache hold, and why would anyone send it over a network?",
            short,
            chat=True,
            system="You answer briefly and never guess.",
        ),
    )
