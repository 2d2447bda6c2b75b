"""Lists on request: so many of a group, numbered unless something else is asked for."""

from __future__ import annotations

from collections.abc import Sequence

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft
from examples.demo_model.corpus.grammar import a, enumerated, number_word, plural
from examples.demo_model.corpus.turn import Turn
from examples.demo_model.corpus.words.categories import GROUPS, IN_ORDER

_ASKED = (
    "List {n} {g}.",
    "List {n} {g}.",
    "List {n} {g}.",
    "Name {n} {g}.",
    "Give me {n} {g}.",
    "Give me a list of {n} {g}.",
    "Can you list {n} {g}?",
    "Write a list of {n} {g}.",
    "Please list {n} {g}.",
    "I need {n} {g}.",
    "Tell me {n} {g}.",
    "Can you name {n} {g}?",
    "Make a list of {n} {g}.",
    "Write down {n} {g}.",
)
_IN_A_LINE = (
    "Name {n} {g} in one line.",
    "List {n} {g}, separated by commas.",
    "Name {n} {g} in a sentence.",
    "Tell me {n} {g} in one line.",
)
_BULLETS = (
    "List {n} {g} as bullet points.",
    "Give me a bulleted list of {n} {g}.",
    "List {n} {g} with bullets.",
    "Write {n} {g} as a bulleted list.",
)
_NUMBERED = ("Give me a numbered list of {n} {g}.", "List {n} {g}, numbered.")
_UNCOUNTED = ("List some {g}.", "Name some {g}.", "Give me a list of {g}.", "Can you list a few {g}?", "Tell me some {g}.")
_MORE = ("Another list, please.", "Now {n} {g}.", "And {n} {g}?", "And now {n} {g}.", "What about {n} {g}?")
_MEMBERS = (
    "fruits",
    "vegetables",
    "animals",
    "birds",
    "fish",
    "insects",
    "trees",
    "flowers",
    "tools",
    "instruments",
    "vehicles",
    "colours",
)
_ONE = {"fish": "fish", "animals": "animal", "birds": "bird", "insects": "insect", "colours": "colour"}
_MOST = 10


def question(dice: Dice) -> Draft[tuple[Turn, ...]]:
    if dice.chance(0.12):
        return _belongs(dice)
    return _list(dice, "")


def _list(dice: Dice, before: str) -> Draft[tuple[Turn, ...]]:
    group = dice.pick(tuple(GROUPS))
    items = GROUPS[group]
    count = min(dice.between(2, 6) if dice.chance(0.75) else dice.between(2, _MOST), len(items))
    chosen = list(items[:count]) if group in IN_ORDER else dice.sample(items, count, shuffle=0.75)
    style = dice.weighted(("plain", "numbered", "bullets", "line", "some"), (62, 8, 12, 10, 8))
    pattern = dice.pick(
        {"plain": _ASKED, "numbered": _NUMBERED, "bullets": _BULLETS, "line": _IN_A_LINE, "some": _UNCOUNTED}[style]
    )
    if style == "some":
        chosen = chosen if count >= 3 or group in IN_ORDER else dice.sample(items, 4, shuffle=0.75)
    number = number_word(count) if dice.chance(0.7) else str(count)
    named = group.replace("colours", "colors") if dice.chance(0.3) else group
    asked = pattern.format(n=number, g=named)
    return Draft(
        f"list/{'/'.join(chosen)}/{style if group in IN_ORDER else ''}",
        lambda: _turns(asked, chosen, style, dice, group),
        always_trained=group in IN_ORDER,
    )


def _turns(asked: str, chosen: Sequence[str], style: str, dice: Dice, group: str) -> tuple[Turn, ...]:
    turns = [Turn(asked, laid_out(chosen, style), laid_out(chosen, style), bare=True)]
    rest = [item for item in GROUPS[group] if item not in chosen]
    if group not in IN_ORDER and rest and dice.chance(0.12):
        more = dice.sample(rest, 1)
        turns.append(
            Turn(
                dice.pick(("One more.", "One more, please.", "Can you add one more?", "And another one?")),
                f"{more[0]}.".capitalize(),
                bare=True,
            )
        )
    elif len(chosen) > 2 and dice.chance(0.12):
        which = dice.below(len(chosen))
        place = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")[which]
        turns.append(
            Turn(f"Which was the {place} one?", f"The {place} one was {chosen[which]}.", f"{chosen[which]}.".capitalize())
        )
    return tuple(turns)


def laid_out(items: Sequence[str], style: str) -> str:
    if style == "line":
        text = enumerated(items) + "."
        return text[0].upper() + text[1:]
    if style == "bullets":
        return "\n".join(f"- {item}" for item in items)
    return "\n".join(f"{index}. {item}" for index, item in enumerate(items, 1))


def _belongs(dice: Dice) -> Draft[tuple[Turn, ...]]:
    """Is a carrot a fruit? What is a fox?"""
    group = dice.pick(_MEMBERS)
    item = dice.pick(GROUPS[group])
    one, article = _singular(group), item if group == "colours" else a(item)
    if dice.chance(0.4):
        asked, answer = f"What is {article}?", f"{article} is {a(one)}."
    else:
        other = dice.pick(_MEMBERS)
        belongs = item in GROUPS[other] or (other == "animals" and group in ("birds", "fish", "insects"))
        told = _singular(other) if belongs else one
        asked, answer = f"Is {article} {a(_singular(other))}?", f"{'yes' if belongs else 'no'}, {article} is {a(told)}."
    return Draft(f"belongs/{asked}", lambda: (Turn(asked, answer[0].upper() + answer[1:]),))


def _singular(group: str) -> str:
    one = _ONE.get(group, group[:-1])
    assert plural(one) == group or group == "fish", group
    return one
