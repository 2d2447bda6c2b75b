"""A question and its answer: what chats are made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """`brief` is the answer of somebody who was told to be brief, the same if empty. `bare` answers are never dressed up:
    JSON and the like."""

    user: str
    assistant: str
    brief: str = ""
    bare: bool = False
