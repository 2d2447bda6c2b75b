"""What every child knows: opposites, sounds, colours of things, who lives where, what things are for."""

from __future__ import annotations

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft
from examples.demo_model.corpus.grammar import a, upper_first
from examples.demo_model.corpus.turn import Turn
from examples.demo_model.corpus.words.things import CATEGORIES

_OPPOSITES = tuple(
    pair.split("/")
    for pair in [
        "hot/cold",
        "big/small",
        "old/new",
        "fast/slow",
        "up/down",
        "day/night",
        "bright/dark",
        "happy/sad",
        "full/empty",
        "open/closed",
        "high/low",
        "long/short",
        "wet/dry",
        "hard/soft",
        "loud/quiet",
        "near/far",
        "early/late",
        "left/right",
        "good/bad",
        "black/white",
        "young/old",
        "rich/poor",
        "strong/weak",
        "clean/dirty",
        "first/last",
        "inside/outside",
        "true/false",
        "thick/thin",
        "sweet/sour",
        "easy/difficult",
        "begin/end",
        "win/lose",
        "push/pull",
        "buy/sell",
        "give/take",
        "ask/answer",
        "love/hate",
        "friend/enemy",
        "summer/winter",
    ]
)
_SOUNDS = (
    ("dog", "barks"),
    ("cat", "meows"),
    ("cow", "moos"),
    ("sheep", "bleats"),
    ("horse", "neighs"),
    ("pig", "grunts"),
    ("duck", "quacks"),
    ("lion", "roars"),
    ("frog", "croaks"),
    ("bee", "buzzes"),
    ("wolf", "howls"),
    ("mouse", "squeaks"),
    ("owl", "hoots"),
    ("hen", "clucks"),
    ("rooster", "crows"),
    ("bird", "sings"),
    ("snake", "hisses"),
    ("bear", "growls"),
    ("goat", "bleats"),
    ("donkey", "brays"),
)
_COLOURS = (
    ("the sky", "blue"),
    ("grass", "green"),
    ("a banana", "yellow"),
    ("snow", "white"),
    ("a strawberry", "red"),
    ("coal", "black"),
    ("a carrot", "orange"),
    ("a lemon", "yellow"),
    ("milk", "white"),
    ("the sun", "yellow"),
    ("a tomato", "red"),
    ("chocolate", "brown"),
    ("a frog", "green"),
    ("an elephant", "grey"),
    ("blood", "red"),
    ("a leaf", "green"),
    ("the sea", "blue"),
    ("a swan", "white"),
    ("a crow", "black"),
    ("a fox", "red"),
    ("a pumpkin", "orange"),
    ("a pig", "pink"),
    ("salt", "white"),
    ("a cherry", "red"),
    ("a cucumber", "green"),
    ("a plum", "purple"),
)
_HOMES = (
    ("a fish", "in water"),
    ("a bird", "in a nest"),
    ("a bee", "in a hive"),
    ("a rabbit", "in a burrow"),
    ("a bear", "in a cave"),
    ("a cow", "in a barn"),
    ("a spider", "in a web"),
    ("a king", "in a castle"),
    ("a camel", "in the desert"),
    ("a penguin", "on the ice"),
    ("a monkey", "in the jungle"),
    ("a whale", "in the sea"),
    ("a squirrel", "in a tree"),
    ("a mole", "under the ground"),
    ("a frog", "in a pond"),
    ("a dog", "in a house with people"),
    ("an owl", "in a hollow tree"),
    ("a horse", "in a stable"),
    ("an ant", "in an ant hill"),
)
_YOUNG = (
    ("dog", "puppy"),
    ("cat", "kitten"),
    ("cow", "calf"),
    ("sheep", "lamb"),
    ("hen", "chick"),
    ("horse", "foal"),
    ("bear", "cub"),
    ("lion", "cub"),
    ("duck", "duckling"),
    ("goat", "kid"),
    ("frog", "tadpole"),
    ("pig", "piglet"),
    ("deer", "fawn"),
    ("goose", "gosling"),
    ("fox", "cub"),
)
_USES = (
    ("spoon", "eating soup"),
    ("knife", "cutting"),
    ("umbrella", "staying dry in the rain"),
    ("bed", "sleeping"),
    ("chair", "sitting"),
    ("pen", "writing"),
    ("key", "opening a lock"),
    ("oven", "baking"),
    ("clock", "telling the time"),
    ("towel", "drying oneself"),
    ("broom", "sweeping the floor"),
    ("lamp", "giving light"),
    ("cup", "drinking"),
    ("hammer", "driving nails"),
    ("saw", "cutting wood"),
    ("bicycle", "riding"),
    ("boat", "crossing water"),
    ("kettle", "boiling water"),
    ("map", "finding the way"),
    ("ladder", "climbing up"),
    ("brush", "painting or cleaning"),
    ("needle", "sewing"),
    ("telescope", "looking at the stars"),
    ("basket", "carrying things"),
    ("drum", "making music"),
    ("lantern", "giving light in the dark"),
    ("book", "reading"),
    ("coat", "keeping warm"),
    ("bell", "calling people"),
    ("phone", "talking to people far away"),
    ("camera", "taking pictures"),
    ("soap", "washing hands"),
)
_FACTS = (
    (("What do bees make?", "What does a bee make?"), "Bees make honey."),
    (("What do cows give us?", "Where does milk come from?"), "Cows give us milk."),
    (("What do hens lay?", "Where do eggs come from?"), "Hens lay eggs."),
    (("What falls from the sky in winter?", "What is white and falls from the sky?"), "Snow falls from the sky in winter."),
    (("What is ice?", "What is ice made of?"), "Ice is frozen water."),
    (("What is bread made of?", "How is bread made?"), "Bread is made of flour, water and a little salt."),
    (("When does the sun rise?", "When does the sun come up?"), "The sun rises in the morning."),
    (("When do the stars shine?", "When can I see stars?"), "The stars shine at night."),
    (("Why do birds have wings?", "What are wings for?"), "Birds have wings to fly."),
    (("What do plants need?", "What does a plant need to grow?"), "Plants need water, light and earth."),
    (("What comes after rain?", "What can you see after rain?"), "After rain there may be a rainbow."),
    (("What does a baker do?", "What is a baker?"), "A baker bakes bread."),
    (("What does a teacher do?", "What is a teacher?"), "A teacher helps others to learn."),
    (("What does a doctor do?", "What is a doctor?"), "A doctor helps people who are ill."),
    (("What does a farmer do?", "What is a farmer?"), "A farmer grows food and keeps animals."),
    (("What does a sailor do?", "What is a sailor?"), "A sailor works on a ship."),
    (("What does a gardener do?", "What is a gardener?"), "A gardener takes care of plants."),
    (("What is a story?", "What is a tale?"), "A story tells what happened to somebody."),
    (("What is a friend?", "What makes a good friend?"), "A friend is somebody who likes you and helps you."),
    (("What is a list?", "What is a list for?"), "A list is a number of things, one after the other."),
    (("What is a number?", "What are numbers for?"), "A number says how many there are."),
    (("What is rain?", "Where does rain come from?"), "Rain is water that falls from the clouds."),
)


def question(dice: Dice) -> Draft[tuple[Turn, ...]]:
    asked, answer, brief, firm = _chosen(dice)
    return Draft(f"everyday/{asked}", lambda: (Turn(asked, answer, brief),), always_trained=firm)


def _chosen(dice: Dice) -> tuple[str, str, str, bool]:
    kind = dice.weighted(
        ("opposite", "sound", "colour", "home", "young", "use", "belongs", "fact"), (20, 12, 14, 10, 8, 16, 14, 14)
    )
    form = dice.below(3)
    if kind == "opposite":
        left, right = dice.pick(_OPPOSITES)
        if dice.chance(0.4):
            left, right = right, left
        right = "young" if left == "old" else right  # of the two opposites that it has
        asked = (
            f"What is the opposite of {left}?",
            f"What is the opposite of the word {left}?",
            f"Tell me the opposite of {left}.",
        )[form]
        return asked, f"The opposite of {left} is {right}.", f"{upper_first(right)}.", form == 0
    if kind == "sound":
        animal, sound = dice.pick(_SOUNDS)
        asked = (
            f"What sound does {a(animal)} make?",
            f"What does {a(animal)} do when it makes a sound?",
            f"How does {a(animal)} sound?",
        )[form]
        return asked, f"{upper_first(a(animal))} {sound}.", f"It {sound}.", form == 0
    if kind == "colour":
        thing, colour = dice.pick(_COLOURS)
        asked = (f"What colour is {thing}?", f"What color is {thing}?", f"Which colour does {thing} have?")[form]
        return asked, f"{upper_first(thing)} is {colour}.", f"{upper_first(colour)}.", form == 0
    if kind == "home":
        animal, home = dice.pick(_HOMES)
        asked = (f"Where does {animal} live?", f"Where can I find {animal}?", f"Where is the home of {animal}?")[form]
        return asked, f"{upper_first(animal)} lives {home}.", f"{upper_first(home)}.", form == 0
    if kind == "young":
        animal, young = dice.pick(_YOUNG)
        asked = (
            f"What is a young {animal} called?",
            f"What do you call a baby {animal}?",
            f"What is the name for a young {animal}?",
        )[form]
        return asked, f"A young {animal} is called {a(young)}.", f"{upper_first(a(young))}.", form == 0
    if kind == "use":
        thing, use = dice.pick(_USES)
        asked = (f"What is {a(thing)} for?", f"What do you use {a(thing)} for?", f"What can I do with {a(thing)}?")[form]
        return asked, f"{upper_first(a(thing))} is for {use}.", f"For {use}.", form == 0
    if kind == "belongs":
        category = dice.pick([category for category in CATEGORIES if category.name in ("light", "music", "toy", "vessel")])
        noun = dice.pick(category.nouns)
        asked = (f"Why would I need {a(noun)}?", f"What does one do with {a(noun)}?", f"What would you do with {a(noun)}?")[form]
        return (
            asked,
            f"One needs {a(noun)} {category.use}." if form == 0 else f"One can use {a(noun)} {category.use}.",
            f"{upper_first(category.use)}.",
            False,
        )
    questions, answer = dice.pick(_FACTS)
    asked = dice.pick(questions)
    return asked, answer, answer, asked == questions[0]
