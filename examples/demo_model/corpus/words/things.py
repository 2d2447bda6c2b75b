"""Things that stories turn on, by what they are for.

`use` follows "a lantern is for ..." or "used it ...": an infinitive. `joy` is how things are once all is well: sentences in which
{t} is the thing, {h} the hero, {f} the friend.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    name: str
    nouns: tuple[str, ...]
    looks: tuple[str, ...]
    use: str
    joy: tuple[str, ...]


CATEGORIES = (
    Category(
        "light", ("lantern", "lamp", "candle", "torch", "oil lamp", "paper lantern"),
        ("bright", "little", "old", "yellow", "round", "red", "green"), "to see in the dark",
        ("That night the {t} shone in the window, and its light could be seen from far away.",
         "Every evening {h} lit the {t}, and the room turned gold.",
         "When it grew dark, {h} and {f} sat in the light of the {t} and told each other stories.")),
    Category(
        "music", ("drum", "flute", "violin", "guitar", "bell", "whistle", "trumpet", "harp", "fiddle", "horn", "tambourine",
        "accordion", "music box"),
        ("wooden", "silver", "little", "old", "shiny", "red", "fine"), "to make music",
        ("That evening {h} played the {t}, and everybody danced.",
        "The sound of the {t} could be heard every evening after that.",
         "{h} played a song on the {t}, and {f} sang along.")),
    Category(
        "paper", ("book", "letter", "map", "painting", "notebook", "diary", "postcard", "picture", "songbook", "story book",
        "newspaper", "poem"),
        ("old", "blue", "thin", "thick", "yellow", "beautiful", "strange"), "to learn something new",
        ("That night {h} looked at the {t} again, and smiled.", "{h} kept the {t} on a shelf, where everyone could look at it.",
         "{h} and {f} sat close together and read in the {t} until it was late.")),
    Category(
        "toy", ("ball", "kite", "doll", "puppet", "marble", "teddy bear", "spinning top", "toy boat", "toy train", "puzzle",
        "balloon",
                "paper plane", "wooden horse", "toy car", "skateboard", "snow globe", "crayon"),
        ("red", "blue", "yellow", "new", "old", "striped", "little"), "to play with",
        ("They played with the {t} until the stars came out.", "From then on {h} and {f} played with the {t} every day.",
         "That night the {t} lay beside {h.his} bed.")),
    Category(
        "clothes", ("scarf", "coat", "hat", "glove", "blanket", "cloak", "sweater", "ribbon", "boot", "shawl", "cap", "mitten",
        "quilt", "dress", "shoe"),
        ("red", "blue", "green", "warm", "soft", "striped", "woollen"), "to keep warm",
        ("The {t} kept {h} warm for many winters.", "Whenever {h} felt the {t}, {h.he} thought of {f}.",
         "That night {h} slept well, with the {t} beside {h.him}.")),
    Category(
        "tool", ("hammer", "rope", "ladder", "shovel", "bucket", "brush", "net", "broom", "fishing rod", "compass", "spyglass",
        "telescope",
                 "paintbrush", "pencil", "camera", "needle", "axe", "rake"),
        ("old", "new", "good", "strong", "small", "plain", "useful"), "to get work done",
        ("After that {h} took good care of the {t}.", "{h} hung the {t} on a nail by the door, ready for the next day.",
         "With the {t}, {h} and {f} did many useful things that year.")),
    Category(
        "food", ("cake", "pie", "apple", "pear", "loaf of bread", "jar of honey", "cookie", "pumpkin", "pot of soup", "melon",
        "pancake",
                 "basket of berries", "bun", "sandwich", "peach", "carrot", "ice cream", "pizza", "chocolate bar"),
        ("sweet", "fresh", "big", "golden", "round", "fine", "tasty"), "to eat",
        ("They ate the {t} together, and it had never tasted so good.", "When the {t} was eaten, nobody was hungry any more.",
         "{h} cut the {t} in two, and gave {f} the larger half.")),
    Category(
        "vessel", ("basket", "cup", "bottle", "teapot", "jug", "bowl", "box", "bag", "suitcase", "jar", "kettle", "vase", "mug",
        "backpack"),
        ("blue", "old", "little", "plain", "painted", "round", "heavy"), "to carry things in",
        ("{h} put the {t} on the table, where the sun fell on it.", "From that day on {h} used the {t} every morning.",
         "{h} filled the {t} with flowers and gave them to {f}.")),
    Category(
        "vehicle", ("boat", "bicycle", "cart", "sled", "raft", "wagon", "scooter", "canoe", "rocket", "car", "sailboat",
        "spaceship"),
        ("small", "red", "old", "fast", "green", "wooden", "sturdy"), "to travel",
        ("The next day {h} and {f} set out in the morning and came back with the {t} at dusk.",
         "All summer long {h} and {f} travelled with the {t}.", "{h} painted both their names on the {t}.")),
    Category(
        "treasure", ("key", "coin", "ring", "pearl", "gem", "crown", "necklace", "feather", "shell", "mirror", "medal",
        "crystal", "stone",
                     "golden egg", "button", "statue", "star", "sword", "shield", "bracelet", "trophy", "treasure chest"),
        ("golden", "silver", "shiny", "old", "strange", "tiny", "smooth"), "to keep and to look at",
        ("{h} kept the {t} in a small box and looked at it on rainy days.", "The {t} lay on the windowsill and shone in the sun.",
         "Whenever {h} held the {t}, {h.he} remembered that day.")),
    Category(
        "garden", ("seed", "flower", "rose", "sunflower", "acorn", "bean", "tulip", "cactus", "sapling", "strawberry plant"),
        ("small", "lovely", "rare", "strong", "green", "healthy"), "to plant and to water",
        ("{h} planted the {t} by the door and watered it every day.",
        "In spring the {t} was the first thing that the bees found.",
         "{h} and {f} took turns watering the {t}.")),
    Category(
        "home", ("clock", "pillow", "umbrella", "tent", "stool", "chair", "rug", "cushion", "watch"),
        ("old", "green", "fine", "little", "striped", "good", "simple"), "to be comfortable",
        ("From then on the {t} had a place of its own in {h}'s home.", "{h} was glad of the {t} every single day.",
         "When {f} came to visit, {f.he} always looked at the {t} first.")),
    Category(
        "magic", ("wand", "crystal ball", "potion", "carpet", "magic mirror", "magic pebble"),
        ("strange", "glowing", "old", "blue", "dusty", "silver"), "to do what nobody can explain",
        ("The {t} never did anything strange again, but {h} kept it all the same.",
         "Sometimes, at midnight, the {t} still glowed a little.", "{h} wrapped the {t} in a cloth and kept it safe.")),
)  # fmt: skip
