"""What a system prompt asks for, and how it shows in every answer of a chat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.turn import Turn


@dataclass(frozen=True)
class Manner:
    """`answer` says a turn's answer in this manner. `systems`: prompts that ask for it; none where nothing is asked."""

    name: str
    systems: tuple[str, ...]
    answer: Callable[[Turn, Dice], str]


def _as_is(turn: Turn, dice: Dice) -> str:
    return turn.assistant


def _brief(turn: Turn, dice: Dice) -> str:
    return turn.brief or turn.assistant


def _polite(turn: Turn, dice: Dice) -> str:
    return (
        turn.assistant
        if turn.bare
        else f"{dice.pick(('Certainly.', 'With pleasure.', 'Gladly.', 'Certainly.'))} {turn.assistant}"
    )


def _cheerful(turn: Turn, dice: Dice) -> str:
    return (
        turn.assistant
        if turn.bare
        else f"{dice.pick(('Hooray, a question!', 'What fun!', 'I like that one!', 'What fun!'))} {turn.assistant}"
    )


def _offering(turn: Turn, dice: Dice) -> str:
    return turn.assistant if turn.bare else f"{turn.assistant} Is there anything else?"


def _pirate(turn: Turn, dice: Dice) -> str:
    return turn.assistant if turn.bare else f"{dice.pick(('Arr!', 'Ahoy!', 'Arr!'))} {turn.assistant}"


NONE = Manner("none", (), _as_is)
PLAIN = Manner(
    "plain",
    (
        "You are a helpful assistant.",
        "You are a helpful assistant.",
        "You are a friendly assistant.",
        "You are the demo of HetServe.",
        "Help the user.",
        "You tell stories and answer questions.",
        "You are a small model that helps people.",
    ),
    _as_is,
)
BRIEF = Manner(
    "brief",
    (
        "You answer briefly and never guess.",
        "You answer briefly and never guess.",
        "Be brief.",
        "Answer in one sentence.",
        "You answer in one short sentence.",
        "Keep your answers short.",
        "You answer briefly.",
        "Answer as briefly as you can.",
        "Short answers only.",
        "You are a helpful assistant. Be brief.",
    ),
    _brief,
)
POLITE = Manner(
    "polite", ("You are very polite.", "Always be polite.", "You are a polite assistant.", "Answer politely."), _polite
)
CHEERFUL = Manner("cheerful", ("You are always cheerful.", "You are a cheerful helper.", "Be cheerful."), _cheerful)
OFFERING = Manner(
    "offering", ("Always ask whether there is anything else.", "End every answer by asking if there is anything else."), _offering
)
PIRATE = Manner("pirate", ("You are a pirate.", "You talk like a pirate.", "Answer like a pirate."), _pirate)

_MANNERS = (NONE, PLAIN, BRIEF, POLITE, CHEERFUL, OFFERING, PIRATE)
_WEIGHTS = (70, 10, 11, 3, 2, 2, 2)


def manner(dice: Dice) -> Manner:
    return dice.weighted(_MANNERS, _WEIGHTS)
