"""Dialogues: small talk, feelings, the weather, names to remember, a lost thing, a shop."""

from __future__ import annotations

from collections.abc import Callable

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft
from examples.demo_model.corpus.grammar import a, enumerated, plural, upper_first
from examples.demo_model.corpus.turn import Turn
from examples.demo_model.corpus.words.categories import GROUPS
from examples.demo_model.corpus.words.characters import ANIMALS, HE_NAMES, SHE_NAMES
from examples.demo_model.corpus.words.places import PLACES
from examples.demo_model.corpus.words.talk import FEELINGS, SMALL, WEATHER, WISHES

Turns = tuple[Turn, ...]
_THINGS = (
    "hat",
    "book",
    "scarf",
    "kite",
    "umbrella",
    "bag",
    "ball",
    "watch",
    "key",
    "glove",
    "ring",
    "pencil",
    "phone",
    "ticket",
    "coat",
    "cup",
)
_NAMED_WITH: dict[str, Callable[[str], str]] = {"instruments": lambda name: f"the {name}", "flowers": plural}
_BETWEEN = (
    Turn("Thank you.", "You are welcome!"),
    Turn("Wait a moment.", "I will wait."),
    Turn("Good.", "What shall we do now?"),
    Turn("I like to talk to you.", "I like to talk to you too."),
    Turn("It is a nice day.", "Yes, it is!"),
)
_HERE = (
    "park",
    "library",
    "market",
    "school",
    "garden",
    "theatre",
    "museum",
    "railway station",
    "town",
    "beach",
    "zoo",
    "playground",
    "bakery",
)


def small_talk(dice: Dice) -> Draft[Turns]:
    said, answers = dice.pick(SMALL)
    index = 0 if dice.chance(0.25) else dice.below(len(said))
    answer = answers[0] if dice.chance(0.5) else dice.pick(answers)
    return Draft(
        f"talk/{said[index]}",
        lambda: (Turn(said[index], answer, answer.split("! ")[0] + ("!" if "! " in answer else "")),),
        always_trained=index < 4,
    )


def dialogue(dice: Dice) -> Draft[Turns]:
    return dice.weighted((_feeling, _weather, _remembered, _lost, _shop, _wish, _liking), (18, 8, 20, 14, 16, 12, 12))(dice)


def _feeling(dice: Dice) -> Draft[Turns]:
    feeling = dice.pick(tuple(FEELINGS))
    reasons, answers = FEELINGS[feeling]
    thing, animal = dice.pick(_THINGS), dice.pick(ANIMALS)
    reason = dice.pick(reasons).format(t=thing, an=animal)
    answer = dice.pick(answers).replace("a {an}", a(animal)).replace("a {t}", a(thing))
    opening = dice.pick((f"I am {feeling}.", f"I feel {feeling}.", f"I am so {feeling} today.", f"Today I am {feeling}."))

    def write() -> Turns:
        if dice.chance(0.4):
            return (Turn(f"I am {feeling} because {reason}.", answer, answer.split(". ")[0].rstrip(".!") + "."),)
        why = dice.pick((f"Why are you {feeling}?", f"You are {feeling}? Tell me why.", "What happened?"))
        return (Turn(opening, why), Turn(dice.pick((f"Because {reason}.", f"{upper_first(reason)}.")), answer))

    return Draft(f"feeling/{feeling}/{reason}", write)


def _weather(dice: Dice) -> Draft[Turns]:
    weather, answers = dice.pick(WEATHER)
    place = dice.pick(("here", "outside", "today", "again", "in our town", "where I live", "in my street"))
    pattern = dice.pick(("It is {w} {p}.", "It is {w} {p}. What should I do?", "It has been {w} {p} all day."))
    if place in ("today", "again"):
        pattern = "It is {w} {p}."
    asked = pattern.format(w=weather, p=place)
    return Draft(f"weather/{asked}", lambda: (Turn(asked, dice.pick(answers)),))


def _remembered(dice: Dice) -> Draft[Turns]:
    """Something said in one turn and asked for in a later one."""
    name = dice.pick(SHE_NAMES + HE_NAMES)
    colour, animal, pet = (
        dice.pick(GROUPS["colours"]),
        dice.pick(GROUPS["animals"]),
        dice.pick(GROUPS["names for a cat"] + GROUPS["names for a dog"]),
    )
    number = dice.between(2, 99)
    kind = dice.pick(("name", "name", "colour", "number", "pet", "animal"))
    said, answer, asked, recalled, detail = {
        "name": (
            dice.pick((f"My name is {name}.", f"I am {name}.", f"Hello, I am {name}.", f"Hi, my name is {name}.")),
            dice.pick((f"Nice to meet you, {name}!", f"Hello, {name}! It is nice to meet you.")),
            dice.pick(("What is my name?", "Do you remember my name?", "Who am I?")),
            f"Your name is {name}.",
            name,
        ),
        "colour": (
            f"My favourite colour is {colour}.",
            f"{upper_first(colour)} is a lovely colour.",
            dice.pick(("What is my favourite colour?", "Which colour do I like?")),
            f"Your favourite colour is {colour}.",
            colour,
        ),
        "number": (
            dice.pick((f"Remember the number {number}.", f"My lucky number is {number}. Please remember it.")),
            f"I will remember {number}.",
            dice.pick(("Which number was it?", "What was the number?")),
            f"The number was {number}.",
            str(number),
        ),
        "pet": (
            f"I have {a(animal)} called {pet}.",
            f"{pet} is a good name for {a(animal)}.",
            dice.pick((f"What is my {animal} called?", f"What is the name of my {animal}?")),
            f"Your {animal} is called {pet}.",
            f"{animal}/{pet}",
        ),
        "animal": (
            f"I like {plural(animal)}.",
            f"I like {plural(animal)} too.",
            "Which animal do I like?",
            f"You like {plural(animal)}.",
            animal,
        ),
    }[kind]
    between = dice.pick(_BETWEEN) if dice.chance(0.3) else None

    def write() -> Turns:
        turns = [Turn(said, answer)]
        turns += (between,) if between else ()
        return (*turns, Turn(asked, recalled, recalled)) if dice.chance(0.85) else tuple(turns)

    return Draft(f"remember/{kind}/{detail}", write)


def _lost(dice: Dice) -> Draft[Turns]:
    thing, place = dice.pick(_THINGS), dice.pick(_HERE)
    row = next(row for row in PLACES if row[0] == place)
    at, spot = f"{row[1]} the {place}", dice.pick(row[2])

    def write() -> Turns:
        turns = [
            Turn(
                dice.pick((f"I have lost my {thing}.", f"I cannot find my {thing}.", f"My {thing} is gone.")),
                dice.pick(
                    (f"I am sorry. Where did you have your {thing} last?", f"Oh dear! Where did you see your {thing} last?")
                ),
            ),
            Turn(
                dice.pick((f"{upper_first(at)}.", f"I think it was {at}.", f"I was {at}.")),
                dice.pick(
                    (
                        f"Then go back to the {place} and look {spot}.",
                        f"Did you look {spot}? Things often lie there.",
                        f"Then look {spot} first, and ask the people there.",
                    )
                ),
            ),
        ]
        if dice.chance(0.5):
            turns.append(
                Turn(
                    dice.pick((f"I found my {thing}!", f"There it was, {spot}!", "I found it, thank you!")),
                    dice.pick(
                        (f"Wonderful! I am glad that you have your {thing} back.", "That is good news! Take good care of it.")
                    ),
                )
            )
        return tuple(turns)

    return Draft(f"lost/{thing}/{place}", write)


def _shop(dice: Dice) -> Draft[Turns]:
    item = dice.pick(GROUPS["fruits"] + GROUPS["vegetables"][:8])
    count, price = dice.between(2, 6), dice.between(1, 5)
    total, paid = count * price, count * price + dice.between(1, 5)
    coins = f"{price} coin{'s' if price > 1 else ''}"

    def write() -> Turns:
        turns = [
            Turn(
                dice.pick(
                    (
                        "Let us play shop.",
                        "Let us play shop. You sell fruit and vegetables.",
                        "Can we play shop?",
                        "You are the shopkeeper.",
                    )
                ),
                dice.pick(("Good day, and welcome to my shop! What would you like?", "Welcome to my shop! What can I give you?")),
            ),
            Turn(dice.pick((f"How much is {a(item)}?", f"What does {a(item)} cost?")), f"{upper_first(a(item))} costs {coins}."),
            Turn(
                dice.pick(
                    (
                        f"I would like {count} {plural(item)}, please.",
                        f"Give me {count} {plural(item)}, please.",
                        f"{count} {plural(item)}, please.",
                    )
                ),
                f"Here are {count} {plural(item)}. That is {total} coins, please.",
            ),
        ]
        if dice.chance(0.5):
            turns.append(
                Turn(
                    f"Here are {paid} coins.",
                    f"Thank you! {paid} minus {total} is {paid - total}, so you get {paid - total} back.",
                )
            )
        return tuple(turns)

    return Draft(f"shop/{item}/{count}/{price}", write)


def _wish(dice: Dice) -> Draft[Turns]:
    asked, group = dice.pick(WISHES)
    first, second, third = dice.sample(GROUPS[group], 3, shuffle=0.8)
    question = dice.pick(asked)
    if group.startswith("names"):
        answer = dice.pick(
            (f"You could call it {first}, or {second}.", f"How about {first}?", f"{first} would be a good name, or {second}.")
        )
    elif group in _NAMED_WITH:
        first, second = (_NAMED_WITH[group](item) for item in (first, second))
        answer = dice.pick(
            (f"How about {first}? Or perhaps {second}.", f"Perhaps {first}, or {second}.", f"I would say {first}.")
        )
    elif group == "things to do on a rainy day":
        answer = dice.pick((f"You could {first}, or {second}.", f"How about this: {first}, and then {second}."))
    elif group == "things to pack for a trip":
        taken = [item if item.endswith("s") else a(item) for item in (first, second, third)]
        answer = f"Take {enumerated(taken)}."
    else:
        answer = dice.pick(
            (f"How about {first}? Or perhaps {second}.", f"Perhaps {first}, or {second}.", f"I would say {first}.")
        )
    return Draft(f"wish/{question}/{answer}", lambda: (Turn(question, answer),))


def _liking(dice: Dice) -> Draft[Turns]:
    hobby = dice.pick(GROUPS["hobbies"])
    name, other = dice.pick(SHE_NAMES + HE_NAMES), dice.pick(GROUPS["things to do on a rainy day"])
    said = dice.pick((f"I like {hobby}.", f"My hobby is {hobby}.", f"I love {hobby}.", f"I enjoy {hobby} with my friend {name}."))

    def write() -> Turns:
        answer = dice.pick(
            (
                f"{upper_first(hobby)} is a fine thing to do. When did you start?",
                "How nice! Do you do it alone, or with friends?",
                f"{upper_first(hobby)} is a good hobby. What do you like about it?",
            )
        )
        turns = [Turn(said, answer)]
        if dice.chance(0.6):
            reply, back = {
                "start": ("Last year.", f"Then you have had a year of {hobby}. That is a good start."),
                "alone": ("With friends.", "That is even better. Things are more fun with friends."),
                "about": ("It is quiet.", "A quiet hour is worth a lot."),
            }["start" if "start" in answer else "alone" if "alone" in answer else "about"]
            turns.append(Turn(reply, back))
        if dice.chance(0.25):
            turns.append(Turn("What else could I do?", f"You could also {other}."))
        return tuple(turns)

    return Draft(f"liking/{said}", write)
