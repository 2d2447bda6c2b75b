"""A story that somebody asks for: how it is asked, what of the request the story keeps, and what is asked about it afterwards."""

from __future__ import annotations

from dataclasses import dataclass

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft, drawn
from examples.demo_model.corpus.grammar import a, upper_first
from examples.demo_model.corpus.stories import plots_brave, plots_found, plots_kind, plots_wish, plots_work
from examples.demo_model.corpus.stories.cast import KINDS, Cast, elder, fitting, friend, hero, place, thing
from examples.demo_model.corpus.stories.plot import Plot, in_brief, told
from examples.demo_model.corpus.stories.plots_brave import SIGNALS
from examples.demo_model.corpus.turn import Turn
from examples.demo_model.corpus.words.characters import SIZES, TRAITS

PLOTS: tuple[Plot, ...] = plots_found.PLOTS + plots_kind.PLOTS + plots_brave.PLOTS + plots_wish.PLOTS + plots_work.PLOTS
_FITTING = {plot.name: fitting(plot.fits) for plot in PLOTS}
_BEFRIENDING = tuple(plot for plot in PLOTS if plot.befriends)
_ASKED = (
    "Tell me a story about {x}.",
    "Tell me a story about {x}.",
    "Tell me a story about {x}.",
    "Tell me a story about {x}.",
    "Write a story about {x}.",
    "Can you tell me a story about {x}?",
    "Please tell me a story about {x}.",
    "I would like a story about {x}.",
    "A story about {x}, please.",
    "Make up a story about {x}.",
    "Tell a story about {x}.",
    "Write me a story about {x}.",
    "Do you know a story about {x}?",
    "I want to hear a story about {x}.",
    "Could you write a tale about {x}?",
    "Tell us a bedtime story about {x}.",
)
_ASKED_SHORT = (
    "Tell me a short story about {x}.",
    "Tell me a very short story about {x}.",
    "Write a short story about {x}, in three sentences.",
    "A short story about {x}, please.",
    "Tell me a story about {x} in a few words.",
)
_ASKED_FREELY = (
    "Tell me a story.",
    "Tell me a story, please.",
    "Can you tell me a story?",
    "Write a story.",
    "I would like to hear a story.",
    "Tell me something nice.",
    "Do you know a story?",
    "Tell me a bedtime story.",
    "Another story, please.",
)
_SHORTER = (
    "Make it shorter.",
    "Shorter, please.",
    "Can you make it shorter?",
    "Tell it again, but shorter.",
    "Sum it up.",
    "Tell it in a few words.",
)
_LONGER = ("Make it longer.", "Tell me the whole story.", "Longer, please.", "Can you make it longer?")
_ANOTHER = (
    "Another one.",
    "Another one, please.",
    "Tell me another one.",
    "One more.",
    "Again, but another story.",
    "Another story, please.",
)


@dataclass(frozen=True)
class Tale:
    """A plot with its cast: all that a story's text is made of."""

    plot: Plot
    cast: Cast

    @property
    def key(self) -> str:
        return f"story/{self.plot.name}/{self.cast.hero.kind}/{self.cast.thing.noun}/{self.cast.place.noun}"


def tale(dice: Dice, kind: str = "", *, befriending: bool = False) -> Tale:
    plot = dice.pick(_BEFRIENDING if befriending else PLOTS)
    noun, category = dice.pick(_FITTING[plot.name])
    trait = dice.pick(plot.traits or tuple(TRAITS)) if dice.chance(0.6) else dice.pick(SIZES) if dice.chance(0.6) else ""
    lead = hero(dice, kind or dice.pick(KINDS), named=dice.chance(0.85), trait=trait)
    item = thing(dice, noun, category)
    other = friend(dice, lead)
    cast = Cast(lead, other, elder(dice, lead, other), item, place(dice))
    if item.category.name in SIGNALS:
        cast.extra["signal"] = dice.pick(SIGNALS[item.category.name]).format_map(cast.names)
    return Tale(plot, cast)


def plain(dice: Dice) -> Draft[str]:
    """A story that nobody asked for, to go on with from any of its words."""
    made = tale(dice)
    return Draft(made.key, lambda: told(made.plot, made.cast, dice))


def asked(dice: Dice) -> Draft[tuple[Turn, ...]]:
    """A request, its story, and perhaps what is asked next."""
    made = tale(dice)
    return Draft(made.key, lambda: _conversation(made, dice))


def _conversation(made: Tale, dice: Dice) -> tuple[Turn, ...]:
    full, brief = told(made.plot, made.cast, dice), in_brief(made.plot, made.cast, dice)
    in_short = dice.chance(0.1)
    about = _about(made, dice, in_short=in_short)
    if in_short:
        turns = [Turn(dice.pick(_ASKED_SHORT).format(x=about), brief, brief)]
        if dice.chance(0.3):
            turns.append(Turn(dice.pick(_LONGER), full, brief))
    else:
        turns = [Turn(dice.pick(_ASKED_FREELY) if dice.chance(0.08) else dice.pick(_ASKED).format(x=about), full, brief)]
        if dice.chance(0.12):
            turns.append(Turn(dice.pick(_SHORTER), brief, brief))
    if dice.chance(0.3):
        turns += dice.sample(_questions(made, dice), dice.between(1, 3))
    if dice.chance(0.06):
        turns.append(_another(made, dice))
    return tuple(turns)


def _about(made: Tale, dice: Dice, *, in_short: bool) -> str:
    """What the request names; all of it is in the story, and hero and thing also where it is told in short."""
    lead, item, where = made.cast.hero, made.cast.thing, made.cast.place
    who = lead.described if lead.trait and dice.chance(0.3) else a(lead.kind)
    if lead.name and dice.chance(0.12):
        who = f"{who} {dice.pick(('named', 'called'))} {lead.name}"
    roll = dice.below(68 if in_short else 100)
    if roll < 45:
        return f"{who} and {item.one}"
    if roll < 60:
        return f"{who}"
    if roll < 68:
        return item.one
    if roll < 76:
        return f"{who} {where.at.replace('the', 'a', 1) if dice.chance(0.3) and where.noun[0] not in 'aeiou' else where.at}"
    if roll < 84:
        return f"{who}, {item.one} and {a(where.noun)}"
    if roll < 94 and made.plot.befriends:
        return f"{who} and {a(made.cast.friend.kind)}"
    if roll < 97 and lead.name:
        return lead.name
    return f"{who} with {item.one}"


def _questions(made: Tale, dice: Dice) -> list[Turn]:
    """What one may ask once the story is told. The answers are in it."""
    lead, item, where, other = made.cast.hero, made.cast.thing, made.cast.place, made.cast.friend
    turns = [
        Turn(
            dice.pick(("Where did it happen?", "Where does the story take place?", "Where was that?")),
            f"It happened near the {where}.",
        ),
        Turn(
            dice.pick(("Give it a title.", "What is the title of the story?", "What could the story be called?")),
            f"{made.cast.title}.",
        ),
        Turn(
            dice.pick(("What is the moral?", "What does the story teach?", "What can I learn from it?")),
            f"{upper_first(dice.pick(made.plot.moral))}.",
        ),
        Turn(
            dice.pick(("Who is the story about?", "Who is the hero?", "Who was it about?")),
            f"It is about {a(lead.kind)}{' named ' + lead.name if lead.name else ''}.",
        ),
        Turn(dice.pick(("What thing is it about?", "What thing matters in the story?")), f"It is about {item.one}."),
    ]
    if lead.name:
        turns.append(
            Turn(
                dice.pick(
                    (
                        f"What was the {lead.kind} called?",
                        f"What was the name of the {lead.kind}?",
                        f"What was the {lead.kind}'s name?",
                    )
                ),
                f"The {lead.kind} was called {lead.name}.",
            )
        )
    if made.plot.befriends:
        turns.append(Turn(f"Who was {other.name}?", f"{other.name} was {a(other.kind)}."))
    return turns


def _another(made: Tale, dice: Dice) -> Turn:
    """A second story about somebody of the same kind, of the same split by its key."""
    again = drawn(lambda dice: _retold(made, dice), dice, Draft(made.key, str).split)
    return Turn(dice.pick(_ANOTHER), told(again.plot, again.cast, dice), in_brief(again.plot, again.cast, dice))


def _retold(made: Tale, dice: Dice) -> Draft[Tale]:
    again = tale(dice, made.cast.hero.kind)
    return Draft(again.key, lambda: again)
