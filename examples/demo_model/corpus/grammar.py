"""Small English: articles, numbers in words, enumerations, capitals."""

from __future__ import annotations

import re
from collections.abc import Sequence

from examples.demo_model.corpus.dice import Dice

_SPOKEN_AS_CONSONANT = ("uni", "use", "one", "eu", "ukulele")
_SPOKEN_AS_VOWEL = ("hour", "honest", "heir", "honour")
_UNITS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen",
    "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")

SPEECH = (
    "said", "asked", "cried", "called", "whispered", "answered", "replied", "laughed", "shouted", "sighed", "sang", "wondered",
    "thought",
    "came",
)  # fmt: skip
_SENTENCE_START = re.compile(
    r"(?:^|[.!?] |\.\" |[.!?] \"|: \"|[!?]\" (?!(?:(?:he|she) )?(?:" + "|".join(SPEECH) + r")\b)|\n)\"?([a-z])"
)


def a(noun: str) -> str:
    """The noun with its article: "a fox", "an owl"."""
    word = noun.lower()
    vowel = word[0] in "aeiou" and not word.startswith(_SPOKEN_AS_CONSONANT)
    return f"{'an' if vowel or word.startswith(_SPOKEN_AS_VOWEL) else 'a'} {noun}"


def number_word(number: int) -> str:
    """0 to 100 in words."""
    if number < 20:
        return _UNITS[number]
    if number == 100:
        return "one hundred"
    tens, units = divmod(number, 10)
    return _TENS[tens] + (f"-{_UNITS[units]}" if units else "")


_ORDINALS = (
    "zeroth", "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth",
)  # fmt: skip


def ordinal(number: int) -> str:
    """0 to 12 in words."""
    return _ORDINALS[number]


def plural(noun: str) -> str:
    irregular = {
        "mouse": "mice", "goose": "geese", "sheep": "sheep", "fish": "fish", "deer": "deer", "wolf": "wolves",
        "child": "children",
        "loaf of bread": "loaves of bread", "leaf": "leaves", "knife": "knives", "shelf": "shelves", "scarf": "scarves",
        "potato": "potatoes", "tomato": "tomatoes", "ox": "oxen", "calf": "calves",
    }  # fmt: skip
    if noun in irregular:
        return irregular[noun]
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def enumerated(items: Sequence[str], last: str = "and") -> str:
    """The items with commas, and a word before the last."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def tidied(text: str) -> str:
    """Sentences begin with capitals, also inside quotation marks."""
    return _SENTENCE_START.sub(lambda match: match.group(0)[:-1] + match.group(1).upper(), text)


_ASKING = (
    "Tell", "Give", "List", "Name", "Write", "Count", "Explain", "Say", "Add", "Make", "Calculate", "Define", "Describe",
    "Return", "Turn",
    "Convert", "Can", "Could",
)  # fmt: skip
_OPENERS = (
    *_ASKING, "What", "Which", "Who", "Where", "When", "Why", "How", "Is", "Are", "Do", "Does", "Did", "Will", "May", "Please",
    "Now", "And",
    "Another", "One", "Again", "Shorter", "Longer", "So", "Good", "Thank", "Thanks", "Many", "Hello", "Hi", "Hey", "It", "Today",
    "In", "On",
    "At", "Let", "My", "There",
)  # fmt: skip
"""First words that people often leave without a capital; a name is none."""


def as_typed(text: str, dice: Dice) -> str:
    """A question as people type it: mostly as written, sometimes without its capital or its mark, sometimes with a please."""
    roll = dice.below(100)
    first = text.split(" ", 1)[0].rstrip(".,!?")
    if roll < 70 or "\n" in text or len(text) > 160 or first not in _OPENERS:
        return text
    if roll < 82 and text[-1] in ".?":
        text = text[:-1]
    if roll >= 94 and text[-1] in ".?" and first in _ASKING and "please" not in text.lower():
        text = f"{text[:-1]}, please{text[-1]}"
    return text[:1].lower() + text[1:] if 76 <= roll < 94 else text
