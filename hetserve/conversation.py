"""A chat as the next request sends it: what was said, and how it gets shorter. No I/O."""

from __future__ import annotations

from hetserve.types import Message


class Conversation:
    """Turns in order, after the system's words if there are any.

    Invariant: between an `ask` and its `answered` or `withdraw` the last message is the question; otherwise every question has
    its answer.
    """

    def __init__(self, system: str | None = None) -> None:
        self._system: tuple[Message, ...] = () if system is None else ({"role": "system", "content": system},)
        self._turns: list[Message] = []

    @property
    def messages(self) -> tuple[Message, ...]:
        return (*self._system, *self._turns)

    def ask(self, question: str) -> None:
        self._turns.append({"role": "user", "content": question})

    def answered(self, text: str) -> None:
        self._turns.append({"role": "assistant", "content": text})

    def withdraw(self) -> None:
        """Take back the question that got no answer."""
        self._turns.pop()

    def forget_oldest(self) -> bool:
        """Drop the oldest question and its answer. False when there is nothing but the open question."""
        if len(self._turns) < 3:
            return False
        del self._turns[:2]
        return True

    def reset(self) -> None:
        """Forget all but the system's words."""
        self._turns.clear()
