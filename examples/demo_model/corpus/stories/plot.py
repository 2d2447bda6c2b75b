"""A plot: beats that follow each other, each with several phrasings, and the whole of it in two or three sentences."""

from __future__ import annotations

from dataclasses import dataclass

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.grammar import tidied
from examples.demo_model.corpus.stories.cast import Cast, Character
from examples.demo_model.corpus.words.characters import TRAITS
from examples.demo_model.corpus.words.places import SEASONS, TIMES, WEATHER

Beat = tuple[str, ...]
"""Phrasings of one step of the story. A beat whose first phrasing is empty may be left out."""


@dataclass(frozen=True)
class Plot:
    """`fits`: categories of things, or single things, that it can turn on; `traits`: heroes that it suits; all if empty.
    `short`: the whole story in brief. `moral`: what it shows."""

    name: str
    beats: tuple[Beat, ...]
    short: tuple[str, ...]
    moral: tuple[str, ...]
    fits: tuple[str, ...] = ()
    traits: tuple[str, ...] = ()
    joy: bool = True

    @property
    def befriends(self) -> bool:
        """Whether a friend has a part in it."""
        return any(all("{f" in phrase for phrase in beat) for beat in self.beats)


class When:
    """Some day, another one each time that it is written."""

    def __init__(self, dice: Dice) -> None:
        self._dice = dice

    def __str__(self) -> str:
        dice = self._dice
        kind = dice.below(10)
        if kind < 5:
            return f"one {dice.pick(WEATHER)} {dice.pick(TIMES)}"
        if kind < 7:
            return f"one {dice.pick(SEASONS)} {dice.pick(TIMES)}"
        return dice.pick(("one day", "early one morning", "late one evening", "one Sunday", "one day", "one afternoon"))


OPENINGS: Beat = (
    "Once upon a time, there was {h.intro} who lived near the {p}.",
    "Once upon a time, {h.intro} lived near the {p}.",
    "Once there was {h.intro} who lived near the {p}.",
    "In a small house near the {p} there lived {h.intro}.",
    "Long ago, {h.intro} lived near the {p}.",
    "There was once {h.intro} who had a home near the {p}.",
    "Not far from the {p} lived {h.intro}.",
    "This is the story of {h.intro} who lived near the {p}.",
)
CLOSINGS: Beat = (
    "",
    "",
    "",
    "",
    "",
    "",
    "And if you walk past the {p} today, you may still hear about it.",
    "And that was the best day of the whole year.",
    "That night {h} fell asleep with a smile.",
    "And from that day on, {h} and {f} were the best of friends.",
    "{h} never forgot that day.",
    "Everybody near the {p} still tells this story.",
)
MORALS: Beat = (
    "",
    "",
    "",
    "{h} had learned that {moral}.",
    "And so {h} learned that {moral}.",
    "After that, {h} always remembered that {moral}.",
    '"Now I know that {moral}," said {h}.',
)


def told(plot: Plot, cast: Cast, dice: Dice) -> str:
    """The story at full length, in paragraphs of a few sentences."""
    names = _names(plot, cast) | {"when": When(dice), "moral": dice.pick(plot.moral), "days": dice.pick(("two", "three", "four"))}
    parts = [dice.pick(OPENINGS)]
    if cast.hero.trait in TRAITS and dice.chance(0.8):
        parts.append(dice.pick(TRAITS[cast.hero.trait]))
    breaks = {len(parts)}
    for index, beat in enumerate(plot.beats):
        phrase = dice.pick(beat)
        if phrase:
            parts.append(phrase)
        if index == len(plot.beats) // 2:
            breaks.add(len(parts))
    breaks.add(len(parts))
    if plot.joy and dice.chance(0.6):
        parts.append(dice.pick(cast.thing.category.joy))
    parts += [phrase for phrase in (dice.pick(MORALS), dice.pick(CLOSINGS)) if phrase]
    text = ""
    for index, part in enumerate(parts):
        text += ("\n\n" if index in breaks and text else " " if text else "") + part
    return _filled(text, names)


def in_brief(plot: Plot, cast: Cast, dice: Dice) -> str:
    return _filled(dice.pick(plot.short), _names(plot, cast))


def _names(plot: Plot, cast: Cast) -> dict[str, object]:
    """Where a plot has no friend, the elder becomes one at the end."""
    return cast.names if plot.befriends else cast.names | {"f": cast.elder}


def _filled(text: str, names: dict[str, object]) -> str:
    for one in names.values():
        if isinstance(one, Character):
            one.known = False
    return tidied(text.format_map(names))
