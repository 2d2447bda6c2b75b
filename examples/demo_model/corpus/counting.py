"""Counting, comparing, and orders that everybody knows by heart: days, months, letters."""

from __future__ import annotations

from collections.abc import Callable

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft
from examples.demo_model.corpus.grammar import number_word, ordinal, upper_first
from examples.demo_model.corpus.turn import Turn
from examples.demo_model.corpus.words.categories import GROUPS

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_STEPS = {1: "", 2: "twos", 3: "threes", 5: "fives", 10: "tens"}
_DAYS, _MONTHS = GROUPS["days of the week"], GROUPS["months"]
_COUNTED = (
    "Count from {a} to {b}{s}.",
    "Count from {a} to {b}{s}.",
    "Can you count from {a} to {b}{s}?",
    "Please count from {a} to {b}{s}.",
    "Count {a} to {b}{s}.",
    "Say the numbers from {a} to {b}{s}.",
)


def question(dice: Dice) -> Draft[tuple[Turn, ...]]:
    return dice.weighted(_KINDS, _WEIGHTS)(dice)


def _one(key: str, write: Callable[[], Turn], *, firm: bool = False) -> Draft[tuple[Turn, ...]]:
    return Draft(key, lambda: (write(),), always_trained=firm)


def _count(dice: Dice) -> Draft[tuple[Turn, ...]]:
    step = dice.weighted((1, 2, 3, 5, 10), (70, 12, 3, 8, 7))
    start = dice.between(0, 20) if dice.chance(0.7) else dice.between(0, 80)
    if step in (5, 10):
        start -= start % step
    start = 1 if step == 1 and dice.chance(0.2) else start
    end = start + step * dice.between(2, 9 if step > 1 else 14)
    down = dice.chance(0.3)
    first, last = (end, start) if down else (start, end)
    numbers = range(first, last + (-1 if down else 1), -step if down else step)
    by = f" by {_STEPS[step]}" if step > 1 else ""
    in_words = step == 1 and end <= 30 and dice.chance(0.15)
    items = [number_word(number) for number in numbers] if in_words else [str(number) for number in numbers]
    pattern = dice.pick(_COUNTED)
    if down:
        pattern = pattern.replace("Count ", "Count down ", 1).replace("count ", "count down ", 1)
    if first == 1 and not down and step == 1 and dice.chance(0.7):
        pattern = dice.pick(("Count to {b}{s}.", "Can you count to {b}{s}?"))
    if first <= 20 and down and last in (0, 1) and step == 1 and dice.chance(0.5):
        pattern = "Count down from {a}{s}." if last == 1 else pattern
    spelled = dice.chance(0.5 if in_words else 0.15) and max(first, last) <= 20
    text = pattern.format(a=number_word(first) if spelled else first, b=number_word(last) if spelled else last, s=by)
    if in_words:
        text = text[:-1] + " in words" + text[-1]
    return _one(
        f"count/{first}/{last}/{step}/{in_words}",
        lambda: Turn(text, upper_first(", ".join(items)) + "."),
        firm=start <= 3 and end <= 10,
    )


def _compare(dice: Dice) -> Draft[tuple[Turn, ...]]:
    a = dice.between(0, 100)
    b = (a + dice.between(1, 100)) % 101
    larger, smaller = max(a, b), min(a, b)
    word, answer, other = dice.pick(
        (("larger", larger, smaller), ("smaller", smaller, larger), ("bigger", larger, smaller), ("greater", larger, smaller))
    )
    asked = dice.pick(
        (
            f"Which is {word}, {a} or {b}?",
            f"Which number is {word}, {a} or {b}?",
            f"What is {word}: {a} or {b}?",
            f"Is {a} {word} than {b}?",
        )
    )
    if asked.startswith("Is "):
        yes = answer == a
        reply = f"{'Yes' if yes else 'No'}, {answer} is {word} than {other}."
    else:
        reply = f"{answer} is {word} than {other}."
    return _one(
        f"compare/{smaller}/{larger}",
        lambda: Turn(asked, reply, f"{reply.split(',')[0]}." if asked.startswith("Is ") else f"{answer}."),
    )


def _neighbour(dice: Dice) -> Draft[tuple[Turn, ...]]:
    names, what = dice.pick(((_DAYS, "day"), (_MONTHS, "month"), (tuple(LETTERS), "letter")))
    index = dice.below(len(names))
    after = dice.chance(0.6)
    if what == "letter" and (index == 25 if after else index == 0):
        after = not after
    other = names[(index + (1 if after else -1)) % len(names)]
    side = "after" if after else "before"
    pattern = dice.below(4)
    asked = (
        f"What {what} comes {side} {names[index]}?",
        f"Which {what} comes {side} {names[index]}?",
        f"What comes {side} {names[index]}?",
        f"Which {what} is {side} {names[index]}?",
    )[pattern]
    return _one(
        f"neighbour/{names[index]}/{side}/{pattern}",
        lambda: Turn(asked, f"{other} comes {side} {names[index]}.", f"{other}."),
        firm=pattern == 0,
    )


def _place(dice: Dice) -> Draft[tuple[Turn, ...]]:
    names, of = dice.pick(
        ((_DAYS, "day of the week"), (_MONTHS, "month of the year"), (tuple(LETTERS[:12]), "letter of the alphabet"))
    )
    index = dice.below(len(names))
    form = dice.below(2)
    asked = (f"What is the {ordinal(index + 1)} {of}?", f"Which is the {ordinal(index + 1)} {of}?")[form]
    return _one(
        f"place/{of}/{index}/{form}", lambda: Turn(asked, f"The {ordinal(index + 1)} {of} is {names[index]}.", f"{names[index]}.")
    )


def _next_number(dice: Dice) -> Draft[tuple[Turn, ...]]:
    number = dice.between(0, 99)
    after = number == 0 or dice.chance(0.6)
    asked = f"{dice.pick(('What number comes', 'Which number comes', 'What comes'))} {'after' if after else 'before'} {number}?"
    answer = number + (1 if after else -1)
    return _one(
        f"next/{number}/{after}", lambda: Turn(asked, f"{answer} comes {'after' if after else 'before'} {number}.", f"{answer}.")
    )


def _even(dice: Dice) -> Draft[tuple[Turn, ...]]:
    number, word = dice.between(1, 100), dice.pick(("even", "odd"))
    is_even = number % 2 == 0
    reply = f"{'Yes' if is_even == (word == 'even') else 'No'}, {number} is {'even' if is_even else 'odd'}."
    return _one(
        f"even/{number}",
        lambda: Turn(f"Is {number} {word}?" if dice.chance(0.7) else f"Is {number} an {word} number?", reply, reply),
    )


def _known(dice: Dice) -> Draft[tuple[Turn, ...]]:
    asked, answer = dice.pick(
        (
            ("Say the alphabet.", ", ".join(LETTERS) + "."),
            ("What is the alphabet?", ", ".join(LETTERS) + "."),
            ("Recite the alphabet.", ", ".join(LETTERS) + "."),
            ("How many days are there in a week?", "There are 7 days in a week."),
            ("How many days does a week have?", "There are 7 days in a week."),
            ("How many months are there in a year?", "There are 12 months in a year."),
            ("How many letters are in the alphabet?", "There are 26 letters in the alphabet."),
            ("How many hours are in a day?", "There are 24 hours in a day."),
            ("How many minutes are in an hour?", "There are 60 minutes in an hour."),
            ("How many seconds are in a minute?", "There are 60 seconds in a minute."),
            ("How many seasons are there?", "There are 4 seasons: spring, summer, autumn and winter."),
            ("Name the days of the week.", ", ".join(_DAYS) + "."),
            ("What are the days of the week?", ", ".join(_DAYS) + "."),
            ("Name the months of the year.", ", ".join(_MONTHS) + "."),
            ("What are the months of the year?", ", ".join(_MONTHS) + "."),
            ("How many legs does a dog have?", "A dog has 4 legs."),
            ("How many legs does a spider have?", "A spider has 8 legs."),
            ("How many wheels does a bicycle have?", "A bicycle has 2 wheels."),
            ("How many fingers are on one hand?", "There are 5 fingers on one hand."),
        )
    )
    return _one(f"known/{asked}", lambda: Turn(asked, answer), firm=True)


_KINDS = (_count, _compare, _neighbour, _place, _next_number, _even, _known)
_WEIGHTS = (45, 12, 14, 6, 7, 5, 11)
