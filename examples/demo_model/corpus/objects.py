"""JSON on request: the fields that were asked for, in that order, each with a value of its type."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft
from examples.demo_model.corpus.grammar import a, enumerated, number_word
from examples.demo_model.corpus.turn import Turn
from examples.demo_model.corpus.words.categories import GROUPS
from examples.demo_model.corpus.words.characters import HE_NAMES, PET_NAMES, SHE_NAMES

Value = str | int | float | bool | list[str]
_NAMES = SHE_NAMES + HE_NAMES
_CITIES = (
    "Paris",
    "London",
    "Rome",
    "Berlin",
    "Madrid",
    "Oslo",
    "Vienna",
    "Lisbon",
    "Dublin",
    "Prague",
    "Athens",
    "Tokyo",
    "Cairo",
    "Lima",
    "Delhi",
    "Boston",
)
_COUNTRIES = (
    "France",
    "Spain",
    "Italy",
    "Norway",
    "Austria",
    "Portugal",
    "Ireland",
    "Greece",
    "Japan",
    "Egypt",
    "Peru",
    "India",
    "Canada",
    "Kenya",
)
_TITLES = (
    "The Last Lantern",
    "A Quiet Harbour",
    "The Fox and the Key",
    "Winter Bread",
    "The Long Road",
    "Seven Stones",
    "The Glass Boat",
    "Under the Hill",
    "The Clockmaker",
    "A Map of Rain",
    "The Blue Door",
    "Night Train",
)

Maker = Callable[[Dice, dict[str, Value]], Value]


def _one_of(items: Sequence[str]) -> Maker:
    return lambda dice, _: dice.pick(items)


def _number(least: int, most: int) -> Maker:
    return lambda dice, _: dice.between(least, most)


def _email(dice: Dice, known: dict[str, Value]) -> Value:
    return f"{str(known.get('name', dice.pick(_NAMES))).lower()}@example.com"


_FIELDS: dict[str, Maker] = {
    "name": _one_of(_NAMES),
    "age": _number(1, 90),
    "city": _one_of(_CITIES),
    "country": _one_of(_COUNTRIES),
    "job": _one_of(GROUPS["jobs"]),
    "email": _email,
    "colour": _one_of(GROUPS["colours"]),
    "color": _one_of(GROUPS["colours"]),
    "animal": _one_of(GROUPS["animals"]),
    "fruit": _one_of(GROUPS["fruits"]),
    "food": _one_of(GROUPS["foods"]),
    "drink": _one_of(GROUPS["drinks"]),
    "price": lambda dice, _: dice.between(1, 99) + dice.pick((0.0, 0.5, 0.25, 0.99)),
    "id": _number(1, 999),
    "year": _number(1900, 2025),
    "title": _one_of(_TITLES),
    "author": _one_of(_NAMES),
    "pages": _number(40, 600),
    "height": _number(90, 200),
    "weight": _number(2, 120),
    "active": lambda dice, _: dice.chance(0.5),
    "score": _number(0, 100),
    "quantity": _number(1, 20),
    "day": _one_of(GROUPS["days of the week"]),
    "month": _one_of(GROUPS["months"]),
    "temperature": _number(-10, 35),
    "sport": _one_of(GROUPS["sports"]),
    "instrument": _one_of(GROUPS["instruments"]),
    "available": lambda dice, _: dice.chance(0.5),
    "rating": _number(1, 5),
    "size": _one_of(("small", "medium", "large")),
}
_LISTS = {
    "hobbies": "hobbies",
    "fruits": "fruits",
    "colours": "colours",
    "colors": "colours",
    "pets": "animals",
    "sports": "sports",
    "tools": "tools",
    "friends": "",
    "foods": "foods",
    "languages": "",
}
_LANGUAGES = ("English", "French", "Spanish", "German", "Italian", "Greek", "Polish", "Hindi")
_KINDS: dict[str, tuple[str, ...]] = {
    "person": (
        "name",
        "age",
        "city",
        "job",
        "email",
        "height",
        "hobbies",
        "country",
        "languages",
        "friends",
        "pets",
        "sport",
        "instrument",
    ),
    "user": ("id", "name", "email", "active", "age", "country", "score"),
    "book": ("title", "author", "year", "pages", "price", "rating", "available"),
    "pet": ("name", "animal", "age", "colour", "weight", "foods"),
    "product": ("id", "name", "price", "colour", "quantity", "size", "available"),
    "child": ("name", "age", "hobbies", "friends", "sport", "colour"),
    "order": ("id", "food", "drink", "price", "quantity", "day"),
    "city": ("city", "country", "temperature", "month"),
    "student": ("name", "age", "score", "languages", "active"),
    "fruit": ("fruit", "colour", "price", "weight", "quantity"),
}
_SIMPLE = (
    "Give me a JSON object with {f}.",
    "Give me a JSON object with {f}.",
    "Write a JSON object with {f}.",
    "Make a JSON object with {f}.",
    "JSON with {f}.",
    "I need a JSON object with {f}.",
    "Return a JSON object with {f}.",
    "Can you give me a JSON object with {f}?",
    "Please write JSON with {f}.",
)
_FOR = (
    "Give me a JSON object for {k} with {f}.",
    "Describe {k} as JSON with {f}.",
    "Write {k} as a JSON object with {f}.",
    "Make up {k} as JSON, with {f}.",
)
_GIVEN = (
    "Write this as JSON: {v}.",
    "Turn this into JSON: {v}.",
    "As a JSON object: {v}.",
    "Make a JSON object from this: {v}.",
    "Convert to JSON: {v}.",
)


def question(dice: Dice) -> Draft[tuple[Turn, ...]]:
    form = dice.weighted(("simple", "for", "given", "array"), (50, 22, 16, 12))
    if form == "array":
        return _array(dice)
    kind = dice.pick(tuple(_KINDS))
    fields = (
        ["name", "age"]
        if form == "simple" and dice.chance(0.08)
        else dice.sample(_KINDS[kind], dice.weighted((1, 2, 3, 4), (8, 42, 35, 15)), shuffle=0.8)
    )
    lengths = {field: dice.between(2, 4) for field in fields if field in _LISTS}
    made: dict[str, Value] = {}
    for field in fields:
        made[field] = _made(field, dice, made, lengths, pet=kind == "pet")
    text = json.dumps(made)
    named = enumerated([_named(field, lengths, dice) for field in fields])
    if dice.chance(0.2):
        named = f"the {'fields' if len(fields) > 1 else 'field'} {enumerated(fields)}"
        lengths = {}
    if form == "given":
        asked = dice.pick(_GIVEN).format(v=", ".join(f"{field} {_said(value)}" for field, value in made.items()))
    elif form == "for":
        asked = dice.pick(_FOR).format(k=a(kind), f=named)
    else:
        asked = dice.pick(_SIMPLE).format(f=named)
    return Draft(f"json/{text}", lambda: _turns(asked, made, kind, dice))


def _turns(asked: str, made: dict[str, Value], kind: str, dice: Dice) -> tuple[Turn, ...]:
    turns = [Turn(asked, json.dumps(made), bare=True)]
    extra = [
        field
        for field in _KINDS[kind]
        if field not in made and field in _FIELDS and field not in ("active", "available", "pages")
    ]
    if extra and dice.chance(0.12):
        field = dice.pick(extra)
        made = made | {field: _FIELDS[field](dice, made)}
        turns.append(
            Turn(
                dice.pick(("Add {f}.", "Now add {f}.", "Add {f} to it.", "Please add {f}.")).format(f=a(field)),
                json.dumps(made),
                bare=True,
            )
        )
    return tuple(turns)


def _array(dice: Dice) -> Draft[tuple[Turn, ...]]:
    group = dice.pick([name for name in GROUPS if " " not in name])
    count = dice.between(2, min(5, len(GROUPS[group])))
    items = dice.sample(GROUPS[group], count, shuffle=0.75)
    asked = dice.pick(
        (
            "Give me a JSON list of {n} {g}.",
            "Give me a JSON array of {n} {g}.",
            "List {n} {g} as JSON.",
            "Write {n} {g} as a JSON list.",
            "A JSON array with {n} {g}, please.",
        )
    )
    text = json.dumps(items)
    return Draft(f"json/{text}", lambda: (Turn(asked.format(n=number_word(count), g=group), text, bare=True),))


def _made(field: str, dice: Dice, made: dict[str, Value], lengths: dict[str, int], *, pet: bool) -> Value:
    if field in _LISTS:
        pool = {"friends": _NAMES, "languages": _LANGUAGES}.get(field) or GROUPS[_LISTS[field]]
        return dice.sample(pool, lengths[field], shuffle=0.8)
    if pet and field == "name":
        return dice.pick(PET_NAMES)
    return _FIELDS[field](dice, made)


def _named(field: str, lengths: dict[str, int], dice: Dice) -> str:
    if field in _LISTS:
        return f"a list of {number_word(lengths[field])} {field}"
    return {"pages": "a number of pages", "active": "an active flag", "available": "an available flag"}.get(field, a(field))


def _said(value: Value) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return enumerated(value) if isinstance(value, list) else str(value)
