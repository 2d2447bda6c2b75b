"""The corpus: every kind of document, in stated shares of the text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from examples.demo_model.corpus import chats, counting, everyday, lists, numbers, objects, talk, unknown
from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Document, Split, drawn
from examples.demo_model.corpus.hetserve import questions
from examples.demo_model.corpus.stories import request


@dataclass(frozen=True)
class Kind:
    """`share`: of a hundred characters of the corpus, how many are of it. `chars`: how long such a document is on average."""

    name: str
    share: float
    chars: int
    write: Callable[[Dice, Split], Document]


KINDS: tuple[Kind, ...] = (
    Kind("text", 18, 790, lambda dice, split: Document("text", text=drawn(request.plain, dice, split))),
    Kind("story", 27, 850, chats.on(request.asked, "story")),
    Kind("hetserve", 18, 243, chats.about_hetserve),
    Kind("facts", 2, 390, lambda dice, split: Document("facts", text=drawn(questions.plain, dice, split))),
    Kind("arithmetic", 5, 95, chats.on(numbers.question, "arithmetic", 4)),
    Kind("counting", 3, 96, chats.on(counting.question, "counting", 3)),
    Kind("list", 4, 119, chats.on(lists.question, "list", 3)),
    Kind("json", 4, 143, chats.on(objects.question, "json", 2)),
    Kind("everyday", 2, 89, chats.on(everyday.question, "everyday", 3)),
    Kind("unknown", 2, 160, chats.on(unknown.question, "unknown", 2)),
    Kind("talk", 1.5, 90, chats.on(talk.small_talk, "talk", 2)),
    Kind("dialogue", 3.5, 138, chats.on(talk.dialogue, "dialogue")),
    Kind("mixed", 10, 652, chats.mixed),
)


def documents(seed: int, split: Split) -> Iterator[Document]:
    """Without end; the same for a seed and a split on every machine."""
    dice = Dice("documents", seed, split.value)
    often = [kind.share / kind.chars for kind in KINDS]
    while True:
        yield dice.weighted(KINDS, often).write(dice, split)


def of_kind(name: str, seed: int, split: Split) -> Iterator[Document]:
    """Documents of one kind.

    Raises:
        ValueError: there is no such kind.
    """
    for kind in KINDS:
        if kind.name == name:
            dice = Dice("documents", name, seed, split.value)
            while True:
                yield kind.write(dice, split)
    raise ValueError(f"Got kind {name!r} but expected one of {[kind.name for kind in KINDS]}")
