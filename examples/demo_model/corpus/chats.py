"""Turns become chats: a manner for the whole of it, questions as people type them, and topics that change on the way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from examples.demo_model.corpus import counting, everyday, lists, numbers, objects, talk, unknown
from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Document, Draft, Message, Split, drawn
from examples.demo_model.corpus.grammar import as_typed
from examples.demo_model.corpus.hetserve import questions
from examples.demo_model.corpus.manners import manner
from examples.demo_model.corpus.stories import request
from examples.demo_model.corpus.turn import Turn

Asking = Callable[[Dice], Draft[tuple[Turn, ...]]]
_LONGEST_CHAT_CHARS = 3200

TOPICS: tuple[tuple[Asking, float], ...] = (
    (request.asked, 12),
    (questions.question, 30),
    (numbers.question, 12),
    (counting.question, 9),
    (lists.question, 10),
    (objects.question, 6),
    (everyday.question, 8),
    (unknown.question, 6),
    (talk.small_talk, 18),
    (talk.dialogue, 10),
)
_ASKINGS, _WEIGHTS = tuple(topic for topic, _ in TOPICS), tuple(weight for _, weight in TOPICS)


def chat(kind: str, turns: Sequence[Turn], dice: Dice) -> Document:
    chosen = manner(dice)
    messages = [Message("system", dice.pick(chosen.systems))] if chosen.systems else []
    for turn in turns:
        messages += [Message("user", as_typed(turn.user, dice)), Message("assistant", chosen.answer(turn, dice))]
    return Document(kind, tuple(messages))


def on(asking: Asking, kind: str, most: int = 1) -> Callable[[Dice, Split], Document]:
    """Chats that keep to one topic, of one to `most` questions."""

    def write(dice: Dice, split: Split) -> Document:
        turns: list[Turn] = []
        for _ in range(dice.between(1, most) if dice.chance(0.5) else 1):
            turns.extend(drawn(asking, dice, split))
        return chat(kind, turns, dice)

    return write


def mixed(dice: Dice, split: Split) -> Document:
    """Two to five questions about whatever comes to mind. A question about HetServe is often followed by another."""
    turns: list[Turn] = list(drawn(talk.small_talk, dice, split)) if dice.chance(0.2) else []
    for _ in range(dice.between(2, 5)):
        asking = dice.weighted(_ASKINGS, _WEIGHTS)
        turns.extend(drawn(asking, dice, split))
        if asking is questions.question and dice.chance(0.4):
            more = drawn(questions.follow_up, dice, split)
            turns.extend(more if all(turn.brief != more[0].brief for turn in turns) else ())
        if sum(len(turn.user) + len(turn.assistant) for turn in turns) > _LONGEST_CHAT_CHARS:
            break
    return chat("mixed", turns, dice)


def about_hetserve(dice: Dice, split: Split) -> Document:
    return chat("hetserve", questions.several(dice, split) if dice.chance(0.35) else drawn(questions.question, dice, split), dice)
