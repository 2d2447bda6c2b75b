"""Who stories are about: kinds, names, traits."""

from __future__ import annotations

ANIMALS = (
    "fox", "rabbit", "mouse", "bear", "owl", "squirrel", "hedgehog", "frog", "cat", "dog", "duck", "goose", "badger", "deer",
    "wolf",
    "otter", "beaver", "turtle", "snail", "bee", "crow", "sparrow", "robin", "hen", "pig", "goat", "sheep", "lamb", "pony",
    "horse",
    "donkey", "cow", "lion", "tiger", "elephant", "monkey", "giraffe", "zebra", "penguin", "seal", "whale", "crab", "swan",
    "mole",
    "bat", "ant", "spider", "parrot", "kitten", "puppy", "panda", "koala", "kangaroo", "camel", "lizard", "toad", "raccoon",
    "dragon",
    "eagle", "crocodile", "dolphin", "octopus", "butterfly", "beetle", "hamster", "rat", "moose", "hippo", "dinosaur", "unicorn",
    "snake",
    "worm", "peacock", "pigeon", "stork", "leopard", "ostrich", "sloth", "walrus", "firefly", "caterpillar", "seagull", "hare",
    "weasel",
)  # fmt: skip
PEOPLE = (
    "girl", "boy", "baker", "farmer", "sailor", "gardener", "king", "queen", "prince", "princess", "knight", "pirate", "painter",
    "teacher", "doctor", "carpenter", "shepherd", "fisherman", "tailor", "clockmaker", "cook", "miller", "wizard", "witch",
    "giant",
    "musician", "postman", "librarian", "blacksmith", "astronaut", "juggler", "weaver", "robot", "ghost", "scientist", "captain",
    "dancer", "nurse", "pilot", "singer", "engineer", "fairy", "elf", "troll", "mermaid", "detective", "inventor", "soldier",
    "explorer",
    "poet", "clown", "magician", "snowman", "scarecrow", "merchant", "hunter", "firefighter", "mechanic", "diver", "thief",
    "student", "child",
)  # fmt: skip
SHE_ONLY = ("girl", "queen", "princess", "witch", "hen", "cow", "fairy", "mermaid")
HE_ONLY = ("boy", "king", "prince", "wizard", "fisherman", "postman", "snowman")
ELDERS = (
    ("owl", "wise old"), ("tortoise", "very old"), ("badger", "grey"), ("heron", "tall"), ("baker", "kind"), ("clockmaker",
    "patient"),
    ("gardener", "old"), ("sailor", "old"), ("teacher", "gentle"), ("grandmother", "kind"), ("grandfather", "old"), ("miller",
    "friendly"),
    ("shepherd", "quiet"), ("blacksmith", "strong"), ("librarian", "clever"), ("raven", "clever"), ("bear", "big, calm"),
    ("fisherman", "grey-bearded"), ("tailor", "thin"), ("carpenter", "cheerful"), ("ferryman", "silent"), ("innkeeper", "round"),
)  # fmt: skip
HE_ELDERS = ("grandfather", "fisherman", "ferryman")
SHE_ELDERS = ("grandmother",)
SHE_NAMES = (
    "Mina", "Ada", "Lily", "Rosa", "Nora", "Ella", "Clara", "Ida", "Maya", "Ruby", "Tessa", "Anna", "Greta", "Hanna", "Ivy",
    "June",
    "Kira", "Lena", "Molly", "Nina", "Olive", "Penny", "Sara", "Vera", "Wanda", "Zoe", "Alma", "Bea", "Dora", "Emma", "Flora",
    "Hazel",
    "Isla", "Julia", "Luna", "Marta", "Nelly", "Pearl", "Rita", "Stella", "Tilda", "Yara",
)  # fmt: skip
HE_NAMES = (
    "Tom", "Ben", "Max", "Leo", "Finn", "Otto", "Hugo", "Karl", "Jonah", "Sam", "Paul", "Oskar", "Emil", "Felix", "Jack", "Noah",
    "Arlo",
    "Bruno", "Daniel", "Eddie", "Frank", "George", "Henry", "Ivan", "Jasper", "Kai", "Liam", "Milo", "Ned", "Oliver", "Peter",
    "Quinn",
    "Robin", "Simon", "Theo", "Victor", "Walter", "Adam", "Colin", "David", "Ravi", "Omar",
)  # fmt: skip
PET_NAMES = (
    "Pip", "Rusty", "Willow", "Bramble", "Pepper", "Clover", "Tilly", "Biscuit", "Maple", "Juniper", "Button", "Hazelnut",
    "Ginger",
    "Poppy", "Toby", "Fern", "Berry", "Misty", "Sunny", "Cricket", "Daisy", "Ember", "Fidget", "Ginkgo", "Honey", "Jolly", "Kip",
    "Lumi",
    "Mango", "Nutmeg", "Olly", "Pebble", "Pumpkin", "Rolo", "Sandy", "Thistle", "Velvet", "Waffle", "Ziggy", "Basil", "Cocoa",
    "Dot",
    "Echo", "Flicker", "Hop", "Inky", "Jet", "Moss", "Pickle", "Tango",
)  # fmt: skip

NAME_STARTS = (
    "Ar",
    "Bel",
    "Cor",
    "Dal",
    "El",
    "Fen",
    "Gar",
    "Hal",
    "Il",
    "Jor",
    "Kel",
    "Lor",
    "Mar",
    "Nim",
    "Or",
    "Pel",
    "Quil",
    "Ros",
    "Sel",
    "Tam",
    "Ul",
    "Ver",
)
NAME_ENDS = ("a", "o", "in", "en", "ara", "ino", "ette", "by", "dra", "ko", "la", "mi", "na", "rik", "sa", "to", "vin")
"""Two of these make a name that nobody has: a name in a request has to be read, not known."""

TRAITS: dict[str, tuple[str, ...]] = {
    "curious": ("{h.he} wanted to know how everything worked.", "{h.he} asked a hundred questions a day.",
                "no box stayed closed for long when {h} was near."),
    "brave": ("{h.he} was not afraid of the dark, nor of thunder.", "when others ran away, {h} stayed and looked.",
              "{h.he} had a small body and a big heart."),
    "shy": ("{h.he} liked to watch the others from behind a tree.",
    "{h.he} spoke so softly that few had ever heard {h.his} voice.",
            "when somebody said hello, {h.he} looked at the ground."),
    "kind": ("{h.he} never walked past anyone who needed help.", "everybody knew that {h.his} door was always open.",
             "{h.he} fed the birds before {h.he} ate {h.his} own breakfast."),
    "clever": ("{h.he} could find a way out of every trouble.", "people came from far away to ask {h.him} for advice.",
               "{h.he} thought twice before {h.he} spoke once."),
    "lazy": ("{h.he} liked nothing better than a long nap.", "{h.he} put off until tomorrow whatever could wait.",
             "{h.his} favourite place was bed."),
    "cheerful": ("{h.he} sang from morning to night.", "even rain could not spoil {h.his} day.",
                 "wherever {h.he} went, somebody began to smile."),
    "grumpy": ("{h.he} complained about the sun, the rain and the wind.", "nobody had seen {h.him} smile for a year.",
               "{h.he} said no before anyone had asked."),
    "lonely": ("{h.he} had a warm home, but nobody to share it with.", "in the evenings it was very quiet there.",
               "{h.he} often wished for a friend."),
    "proud": ("{h.he} liked to talk about {h.him}self.", "{h.he} was sure that nobody could do anything better.",
              "{h.he} looked at {h.his} own face in every pond."),
    "patient": ("{h.he} could wait a whole day for a single flower to open.", "{h.he} did one thing at a time, and did it well.",
                "{h.he} was never in a hurry."),
    "careless": ("{h.he} left {h.his} things wherever {h.he} stood.", "{h.he} always forgot one thing or another.",
                 "{h.he} ran first and looked later."),
    "dreamy": ("{h.he} could look at the clouds for hours.", "{h.he} saw castles and ships in every cloud.",
               "{h.his} head was full of faraway places."),
    "busy": ("{h.he} had something to do from dawn to dusk.", "{h.he} got up before the sun every day.",
             "there was always one more thing to do."),
    "honest": ("{h.he} always said what was true, even when it was hard.", "everybody trusted {h.him}.",
               "{h.he} had never told a lie."),
    "restless": ("{h.he} could not sit still for a minute.", "{h.he} always wanted to see what lay behind the next hill.",
                 "{h.he} had worn out three pairs of shoes that year."),
}  # fmt: skip
SIZES = ("little", "small", "young", "old", "tiny", "big")
