"""Who and what a story's sentences speak of, under the short names that plots use.

{h} hero, {f} friend, {o} elder: a name ("Rusty") or "the fox"; {h.intro} "a curious fox named Rusty"; {h.ref} now the name, now
"the fox"; {h.full} "Rusty the fox"; {o.a} "an old owl". Who was introduced before is called by name in place of these.
{h.he} {h.him} {h.his} pronouns
{t} thing: "lantern"; {t.a} "an old lantern"; {t.one} "a lantern"; {t.use} what it is for
{p} place: "river"; {p.at} "by the river"; {p.to} "to the river"; {p.spot} {p.other} places to look in
"""

from __future__ import annotations

from dataclasses import dataclass, field

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.grammar import a, upper_first
from examples.demo_model.corpus.words.characters import (
    ANIMALS,
    ELDERS,
    HE_ELDERS,
    HE_NAMES,
    HE_ONLY,
    NAME_ENDS,
    NAME_STARTS,
    PEOPLE,
    PET_NAMES,
    SHE_ELDERS,
    SHE_NAMES,
    SHE_ONLY,
    SIZES,
)
from examples.demo_model.corpus.words.places import PLACES
from examples.demo_model.corpus.words.things import CATEGORIES, Category

KINDS = ANIMALS + PEOPLE


@dataclass
class Character:
    """`name` is empty for one who is only called by kind. `trait` is an adjective or empty."""

    kind: str
    name: str
    she: bool
    trait: str
    dice: Dice
    known: bool = False
    """Set by the first sentence that introduces them; later ones then call them by name."""

    def __str__(self) -> str:
        return self.name or f"the {self.kind}"

    @property
    def ref(self) -> str:
        return self.name if self.name and self.dice.chance(0.6) else f"the {self.kind}"

    @property
    def described(self) -> str:
        return a(f"{self.trait} {self.kind}".strip())

    @property
    def a(self) -> str:
        return self._introduced(self.described)

    @property
    def intro(self) -> str:
        return self._introduced(f"{self.described} named {self.name}" if self.name else self.described)

    @property
    def full(self) -> str:
        return self._introduced(f"{self.name} the {self.kind}" if self.name else a(self.kind))

    def _introduced(self, words: str) -> str:
        words, self.known = (str(self) if self.known else words), True
        return words

    @property
    def he(self) -> str:
        return "she" if self.she else "he"

    @property
    def him(self) -> str:
        return "her" if self.she else "him"

    @property
    def his(self) -> str:
        return "her" if self.she else "his"


@dataclass(frozen=True)
class Thing:
    noun: str
    look: str
    category: Category

    def __str__(self) -> str:
        return self.noun

    @property
    def one(self) -> str:
        return a(self.noun)

    @property
    def a(self) -> str:
        return a(f"{self.look} {self.noun}")

    @property
    def use(self) -> str:
        return self.category.use


@dataclass(frozen=True)
class Place:
    noun: str
    preposition: str
    spot: str
    other: str

    def __str__(self) -> str:
        return self.noun

    @property
    def at(self) -> str:
        return f"{self.preposition} the {self.noun}"

    @property
    def to(self) -> str:
        return f"to the {self.noun}"


@dataclass
class Cast:
    hero: Character
    friend: Character
    elder: Character
    thing: Thing
    place: Place
    extra: dict[str, str] = field(default_factory=dict)

    @property
    def names(self) -> dict[str, object]:
        return {"h": self.hero, "f": self.friend, "o": self.elder, "t": self.thing, "p": self.place, **self.extra}

    @property
    def title(self) -> str:
        return f"{upper_first(self.hero.kind)} and the {upper_first(self.thing.noun)}"


def hero(dice: Dice, kind: str, *, named: bool = True, trait: str = "", name: str = "") -> Character:
    she = kind in SHE_ONLY or (kind not in HE_ONLY and dice.chance(0.5))
    if name:
        she = name in SHE_NAMES or (name not in HE_NAMES and she)
    elif named and dice.chance(0.1):
        name = dice.pick(NAME_STARTS) + dice.pick(NAME_ENDS)
    elif named and kind in ANIMALS:
        name = dice.pick(PET_NAMES)
    elif named:
        name = dice.pick(SHE_NAMES if she else HE_NAMES)
    return Character(kind, name, she, trait, dice)


def friend(dice: Dice, of: Character, kind: str = "") -> Character:
    """Somebody of another kind and name than the hero; animals befriend animals."""
    pool = ANIMALS if of.kind in ANIMALS or dice.chance(0.3) else PEOPLE
    while not kind or kind == of.kind:
        kind = dice.pick(pool)
    while True:
        other = hero(dice, kind, trait=dice.pick(SIZES) if dice.chance(0.5) else "")
        if other.name != of.name:
            return other


def elder(dice: Dice, *others: Character) -> Character:
    while True:
        kind, trait = dice.pick(ELDERS)
        if all(kind != other.kind for other in others):
            she = kind in SHE_ELDERS or (kind not in HE_ELDERS and dice.chance(0.5))
            return Character(kind, "", she, trait, dice)


def fitting(fits: tuple[str, ...]) -> tuple[tuple[str, Category], ...]:
    """The things that a plot can turn on; `fits` names categories or things, and nothing stands for all of them."""
    return tuple(
        (noun, category)
        for category in CATEGORIES
        for noun in category.nouns
        if not fits or category.name in fits or noun in fits
    )


def thing(dice: Dice, noun: str, category: Category) -> Thing:
    return Thing(noun, dice.pick([look for look in category.looks if look not in noun]), category)


def place(dice: Dice, noun: str = "") -> Place:
    known, preposition, spots = next(row for row in PLACES if row[0] == noun) if noun else dice.pick(PLACES)
    spot, other = dice.sample(spots, 2)
    return Place(known, preposition, spot, other)
