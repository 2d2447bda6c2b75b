"""What the corpus is made of, and which of it is held out.

A *draft* is a document whose content is settled and whose text is not yet written: its key says what it is about. The key
alone decides whether it is held out, so that nothing a model is measured on was ever drawn for its training, whatever the seed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from hashlib import blake2b
from typing import Generic, Literal, TypeVar

from examples.demo_model.corpus.dice import Dice

Made = TypeVar("Made", covariant=True)
HELD_OUT_PER_MILLE = 40
_MOST_TRIES = 20_000


class Split(Enum):
    TRAIN = "train"
    HELD_OUT = "held-out"


@dataclass(frozen=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True)
class Document:
    """One thing to read: a chat, with `text` empty, or plain text, with `messages` empty.

    Roles of a chat: an optional system message, then user and assistant in turns, the assistant last.
    """

    kind: str
    messages: tuple[Message, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class Draft(Generic[Made]):
    """`key` names the content; `write` makes the text, by the dice it was drafted with. `always_trained` keeps the one
    phrasing that everybody types out of the held-out part."""

    key: str
    write: Callable[[], Made]
    always_trained: bool = False

    @property
    def split(self) -> Split:
        return Split.HELD_OUT if not self.always_trained and is_held_out(self.key) else Split.TRAIN


def is_held_out(key: str) -> bool:
    """The same answer on every machine and Python: four of a hundred keys."""
    digest = blake2b(key.encode(), digest_size=8, person=b"demo-corpus").digest()
    return int.from_bytes(digest, "big") % 1000 < HELD_OUT_PER_MILLE


def drawn(make: Callable[[Dice], Draft[Made]], dice: Dice, split: Split) -> Made:
    """What `make` drafts first that belongs to `split`, written out.

    Raises:
        RuntimeError: nothing that `make` drafts does.
    """
    for _ in range(_MOST_TRIES):
        draft = make(dice)
        if draft.split is split:
            return draft.write()
    raise RuntimeError(f"{make} drafts nothing that is {split.value}")
