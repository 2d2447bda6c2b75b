"""Small sums: plus, minus, times, in figures, in words and in little problems."""

from __future__ import annotations

from dataclasses import dataclass

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft
from examples.demo_model.corpus.grammar import number_word, plural
from examples.demo_model.corpus.turn import Turn
from examples.demo_model.corpus.words.characters import HE_NAMES, SHE_NAMES

_SIGNS = {"plus": "+", "minus": "-", "times": "x"}
_ASKED = (
    "What is {q}?",
    "What is {q}?",
    "What is {q}?",
    "How much is {q}?",
    "Calculate {q}.",
    "{q}?",
    "Can you tell me what {q} is?",
    "What does {q} make?",
    "Tell me what {q} is.",
    "Please work out {q}.",
)
_ADDED = ("Add {a} and {b}.", "What is the sum of {a} and {b}?", "What do you get when you add {a} and {b}?")
_ITEMS = (
    "apple",
    "coin",
    "marble",
    "book",
    "shell",
    "stone",
    "egg",
    "cookie",
    "pencil",
    "button",
    "flower",
    "nut",
    "card",
    "balloon",
    "kite",
    "cup",
    "hat",
    "pear",
)


@dataclass(frozen=True)
class Sum:
    a: int
    operation: str
    b: int

    @property
    def result(self) -> int:
        return {"plus": self.a + self.b, "minus": self.a - self.b, "times": self.a * self.b}[self.operation]


def question(dice: Dice) -> Draft[tuple[Turn, ...]]:
    """A sum. The operands decide the split; where there are few (up to 12), all of the question does."""
    asked = _sum(dice)
    form = dice.weighted(("spoken", "signs", "words", "added", "problem"), (50, 26, 6, 6, 22))
    pattern = dice.pick(_ASKED)
    turn = _turn(asked, form, pattern, dice)
    small = max(asked.a, asked.b) <= 12
    firm = small and turn.user[:8] == "What is " and turn.user[8].isdigit()
    key = (
        turn.user.lower().rstrip(" ?.=").replace(" ", "")
        if small
        else f"{min(asked.a, asked.b)} {asked.operation} {max(asked.a, asked.b)}"
    )
    return Draft(f"sum/{key}", lambda: (turn,), always_trained=firm)


def _sum(dice: Dice) -> Sum:
    operation = dice.weighted(("plus", "minus", "times"), (50, 30, 20))
    if operation == "times":
        return Sum(dice.between(0 if dice.chance(0.1) else 1, 12), operation, dice.between(1, 12))
    if dice.chance(0.65):
        a, b = dice.between(0, 12), dice.between(0, 12)
    elif dice.chance(0.6):
        a, b = dice.between(1, 50), dice.between(1, 20)
    else:
        a, b = dice.between(1, 90) // 10 * 10, dice.between(1, 40)
    if operation == "minus":
        a, b = max(a, b), min(a, b)
    return Sum(a, operation, b)


def _turn(asked: Sum, form: str, pattern: str, dice: Dice) -> Turn:
    a, b, result = asked.a, asked.b, asked.result
    if form == "added" and asked.operation == "plus":
        return Turn(dice.pick(_ADDED).format(a=a, b=b), f"{a} plus {b} is {result}.", f"{result}.")
    if form == "words" and result <= 100:
        words = f"{number_word(a)} {asked.operation} {number_word(b)}"
        return Turn(
            pattern.format(q=words).capitalize() if pattern == "{q}?" else pattern.format(q=words),
            f"{words.capitalize()} is {number_word(result)}.",
            f"{number_word(result).capitalize()}.",
        )
    if form == "problem" and a > 1 and 0 < b < 30:
        return _problem(asked, dice)
    if form == "signs":
        tight = dice.chance(0.25)
        sign = dice.pick(("x", "*")) if asked.operation == "times" else _SIGNS[asked.operation]
        query = f"{a}{sign}{b}" if tight else f"{a} {sign} {b}"
        if dice.chance(0.2):
            return Turn(f"{query} =", f"{a} {sign} {b} = {result}.", f"{result}.")
        return Turn(pattern.format(q=query), f"{a} {sign} {b} = {result}.", f"{result}.")
    return Turn(pattern.format(q=f"{a} {asked.operation} {b}"), f"{a} {asked.operation} {b} is {result}.", f"{result}.")


def _problem(asked: Sum, dice: Dice) -> Turn:
    she = dice.chance(0.5)
    name = dice.pick(SHE_NAMES if she else HE_NAMES)
    he, his = ("she", "her") if she else ("he", "his")
    noun = dice.pick(_ITEMS)
    a, b, result = asked.a, asked.b, asked.result
    many, more = f"{a} {plural(noun)}", f"{b} {noun if b == 1 else plural(noun)}"
    left = f"{result} {noun if result == 1 else plural(noun)}"
    if asked.operation == "plus":
        story = dice.pick(
            (
                f"{name} has {many} and gets {b} more. How many {plural(noun)} does {he} have?",
                f"{name} finds {many} in the morning and {more} in the evening. How many are there together?",
                f"There are {many} on the table. {name} brings {b} more. How many {plural(noun)} are on the table?",
            )
        )
        return Turn(
            story, f"{a} plus {b} is {result}, so there are {result} {plural(noun) if result != 1 else noun}.", f"{result}."
        )
    if asked.operation == "minus":
        story = dice.pick(
            (
                f"{name} has {many} and gives away {b}. How many {plural(noun)} are left?",
                f"{name} had {many} and lost {more}. How many does {he} have now?",
                f"There are {many} in {name}'s box. {he.capitalize()} takes out {b}. How many are left in {his} box?",
            )
        )
        return Turn(story, f"{a} minus {b} is {result}, so {'1 is' if result == 1 else f'{result} are'} left.", f"{result}.")
    story = dice.pick(
        (
            f"{name} has {a} boxes with {more} in each. How many {plural(noun)} are there?",
            f"There are {a} children, and each has {more}. How many {plural(noun)} do they have together?",
        )
    )
    return Turn(story, f"{a} times {b} is {result}, so there are {left}.", f"{result}.")
