"""A question about HetServe with its answer, alone or after another one, and facts in a row as plain text."""

from __future__ import annotations

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft, Split, drawn
from examples.demo_model.corpus.grammar import upper_first
from examples.demo_model.corpus.hetserve import basics, cluster, deaths, moving, serving, tokens, using
from examples.demo_model.corpus.hetserve.fact import Fact
from examples.demo_model.corpus.turn import Turn

GROUPS: tuple[tuple[Fact, ...], ...] = (
    basics.FACTS, using.FACTS, serving.FACTS, tokens.FACTS, moving.FACTS, cluster.FACTS, deaths.FACTS,
)  # fmt: skip
FACTS: tuple[Fact, ...] = tuple(fact for group in GROUPS for fact in group)
_DEFINED = (
    "What is {x}?",
    "What is {x}?",
    "Explain {x}.",
    "Can you explain {x}?",
    "Tell me about {x}.",
    "What is {x} in HetServe?",
    "Define {x}.",
    "Please explain {x}.",
    "What do you know about {x}?",
    "Can you tell me what {x} is?",
    "Explain to me what {x} is.",
    "I do not know what {x} is.",
    "So what is {x}?",
    "Explain {x} in simple words.",
    "What is meant by {x}?",
)
_NEXT = (
    "And what is {x}?",
    "And {x}?",
    "What about {x}?",
    "And what about {x}?",
    "How about {x}?",
    "Now explain {x}.",
    "And what does {x} mean?",
)
_TEXTBOOK = (serving.FACTS, tokens.FACTS, moving.FACTS, cluster.FACTS + deaths.FACTS)
_FIRM = 2
"""How many phrasings of a fact, the likeliest, are asked most and never held out."""
_CORE = (
    "hetserve", "prefill", "decode", "kv cache", "why send kv", "why separate", "disaggregation", "worker dies", "router",
    "goodput", "ttft",
    "prefix cache", "start", "same after death", "this model", "where am i", "life of a request", "ray", "exact", "block",
)  # fmt: skip
_BY_INTEREST = FACTS + tuple(fact for fact in FACTS if fact.name in _CORE) * 2
"""What people who try a demo ask about comes three times as often."""


def question(dice: Dice) -> Draft[tuple[Turn, ...]]:
    return _turn(dice, dice.pick(_BY_INTEREST), ())


def follow_up(dice: Dice) -> Draft[tuple[Turn, ...]]:
    """A question that goes on from another about HetServe."""
    fact = dice.pick(_BY_INTEREST)
    return _turn(dice, fact, _NEXT if fact.term and dice.chance(0.7) else ())


def several(dice: Dice, split: Split) -> tuple[Turn, ...]:
    """A talk about two to four facts."""
    turns = drawn(question, dice, split)
    for _ in range(dice.between(1, 3)):
        more = drawn(follow_up, dice, split)
        if all(turn.brief != more[0].brief for turn in turns):
            turns += more
    return turns


def plain(dice: Dice) -> Draft[str]:
    """Three to five facts of one kind as a text."""
    known = [fact for fact in dice.pick(_TEXTBOOK) if fact.term and not fact.answers[1].startswith("It ")]
    chosen = [(fact, 1) for fact in dice.sample(known, min(len(known), dice.between(2, 5)))]
    if chosen[0][0] is not FACTS[0] and dice.chance(0.3):
        chosen = [(FACTS[0], 1), *chosen]
    key = "facts/" + "/".join(f"{fact.name}:{index}" for fact, index in chosen)
    return Draft(key, lambda: " ".join(fact.answers[index] for fact, index in chosen))


def _likeliest(fact: Fact) -> tuple[int, ...]:
    """Which of its phrasings (those for every term, then its own) nearly everybody uses."""
    own = len(_DEFINED) if fact.term else 0
    return (*range(_FIRM if fact.term else 0), *range(own, own + _FIRM))


def _turn(dice: Dice, fact: Fact, patterns: tuple[str, ...]) -> Draft[tuple[Turn, ...]]:
    known = tuple(_DEFINED if fact.term and not patterns else ())
    phrasings = patterns or (*known, *fact.asked)
    index = dice.below(len(phrasings)) if patterns or dice.chance(0.65) else dice.pick(_likeliest(fact))
    pattern = phrasings[index]
    asked = upper_first(pattern.format(x=fact.term) if index < len(known) or patterns else pattern)
    firm = index == 0 if patterns else index in _likeliest(fact)
    answer = fact.answers[0] if dice.chance(0.3) else dice.pick(fact.answers[1:])
    return Draft(f"hetserve/{fact.name}/{pattern}", lambda: (Turn(asked, answer, fact.answers[0]),), always_trained=firm)
