"""What so small a model cannot know or do, and how it says so."""

from __future__ import annotations

from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import Draft
from examples.demo_model.corpus.grammar import a, upper_first
from examples.demo_model.corpus.turn import Turn
from examples.demo_model.corpus.words.categories import GROUPS
from examples.demo_model.corpus.words.characters import HE_NAMES, SHE_NAMES

_PATTERNS = (
    "What is the capital of {country}?",
    "Who is the president of {country}?",
    "How many people live in {country}?",
    "What language do they speak in {country}?",
    "Where is {country}?",
    "Who won the {year} {cup}?",
    "Who invented the {device}?",
    "When was the {device} invented?",
    "What happened in {year}?",
    "Who was {person}?",
    "Who is {person}?",
    "When was {person} born?",
    "What is {topic}?",
    "Explain {topic}.",
    "Can you explain {topic}?",
    "Tell me about {topic}.",
    "How does {topic} work?",
    "Who wrote {title}?",
    "What is the weather in {city}?",
    "What is the news today?",
    "What time is it in {city}?",
    "How far is it to {city}?",
    "How tall is {mount}?",
    "How deep is the {sea}?",
    "What does {made} mean?",
    "What is {a_made}?",
    "Who is the mayor of {city}?",
    "What is the price of {stock} today?",
    "What is the square root of {big}?",
    "What is {big} times {big2}?",
    "How old is {person}?",
    "Tell me about the history of {country}.",
    "What is the population of {city}?",
    "Translate {word} into {language}.",
    "How do you say {word} in {language}?",
    "Write a program in {code}.",
    "Write some {code} code.",
    "Write a poem about {word}.",
    "What is the best phone?",
    "What should I do about my back pain?",
    "Which stocks should I buy?",
    "Who will win the election?",
    "What is the meaning of life?",
    "Can you search the web for {topic}?",
    "Open the file {word}.txt.",
    "Send an email to {first}.",
    "What did I do yesterday?",
    "What is the fastest car in the world?",
    "Do you know {person}?",
    "What is the law on {topic}?",
    "Prove that {topic} is true.",
    "How do I fix my {device}?",
    "Solve x + {big} = {big2}.",
)
_COUNTRIES = (
    "Freedonia",
    "France",
    "Brazil",
    "Mongolia",
    "Zambia",
    "Chile",
    "Canada",
    "Atlantis",
    "Ruritania",
    "Japan",
    "Germany",
    "Peru",
    "Kenya",
    "Sweden",
    "Poland",
    "Vietnam",
)
_CITIES = (
    "Paris",
    "Tokyo",
    "Nairobi",
    "Lima",
    "Berlin",
    "Chicago",
    "Sydney",
    "Mumbai",
    "Oslo",
    "Madrid",
    "New York",
    "London",
    "Rome",
)
_DEVICES = (
    "telephone",
    "light bulb",
    "steam engine",
    "computer",
    "printing press",
    "radio",
    "television",
    "microscope",
    "airplane",
    "washing machine",
    "car",
)
_TOPICS = (
    "photosynthesis",
    "inflation",
    "the French Revolution",
    "quantum mechanics",
    "relativity",
    "democracy",
    "gravity",
    "evolution",
    "the stock market",
    "DNA",
    "a black hole",
    "the Roman Empire",
    "philosophy",
    "electricity",
    "a neural network",
    "climate change",
    "the Cold War",
    "nuclear power",
    "algebra",
    "cryptography",
    "an atom",
    "the immune system",
    "a blockchain",
    "plate tectonics",
    "chess strategy",
    "football tactics",
    "opera",
    "jazz",
    "a compiler",
    "a mortgage",
    "vaccination",
    "the Renaissance",
    "a transistor",
    "an earthquake",
    "the tax system",
    "psychology",
    "geometry",
    "a virus",
    "a supernova",
    "the internet",
    "TensorFlow",
    "Docker",
    "quicksort",
    "HTTP caching",
    "a database index",
)
_CUPS = ("World Cup", "Olympic marathon", "chess championship", "tennis final", "ski race", "Tour de France", "song contest")
_TITLES = (
    "Hamlet",
    "Don Quixote",
    "War and Peace",
    "Faust",
    "the Odyssey",
    "Moby Dick",
    "Emma",
    "The Trial",
    "The Glass Harbour",
    "Ten Nights",
)
_LANGUAGES = ("French", "German", "Latin", "Chinese", "Spanish", "Greek", "Japanese", "Welsh")
_CODE = ("Python", "Java", "C", "Rust", "JavaScript", "SQL")
_MOUNTS = ("Mount Everest", "the Eiffel Tower", "Kilimanjaro", "the Matterhorn", "Big Ben", "a giraffe in metres")
_SEAS = ("Pacific Ocean", "Black Sea", "Lake Baikal", "North Sea", "Atlantic")
_STOCKS = ("gold", "oil", "bread in Rome", "bitcoin", "copper", "a flat in Paris")
_ONSETS = ("bl", "fl", "gr", "z", "v", "qu", "m", "dr", "sn", "tr", "pl", "gl", "w", "k")
_NUCLEI = ("a", "o", "i", "u", "oo", "e")
_CODAS = ("rb", "mp", "x", "nk", "zz", "dle", "ggle", "rn", "bbin", "st", "lfo", "nter")
_LAST = (
    "Smith",
    "Garcia",
    "Novak",
    "Okafor",
    "Tanaka",
    "Meyer",
    "Rossi",
    "Larsen",
    "Dubois",
    "Petrov",
    "Newton",
    "Curie",
    "Mozart",
    "Lincoln",
    "Einstein",
    "Shakespeare",
)
_KNOWS = (
    "I know about stories, small sums, lists and HetServe.",
    "I can tell stories, add small numbers, make lists, and explain HetServe.",
    "Ask me for a story, a small sum, a list, or about HetServe.",
    "I am better at stories, counting, lists and questions about HetServe.",
)
_DOES_NOT_KNOW = (
    "I am a very small model, and I do not know that.",
    "I do not know that. I am a very small model.",
    "I am sorry, I do not know that.",
    "That is beyond me: I am a very small model.",
)
_CANNOT = (
    "I am a very small model, and I cannot do that.",
    "I cannot do that. I am a very small model.",
    "I am sorry, I cannot do that.",
)
_TASKS = ("Translate", "Write", "Open", "Send", "Can you search", "Prove", "Solve", "How do I fix")


def question(dice: Dice) -> Draft[tuple[Turn, ...]]:
    asked = upper_first(_filled(dice.pick(_PATTERNS), dice))
    refusals = _CANNOT if asked.startswith(_TASKS) else _DOES_NOT_KNOW
    return Draft(
        f"unknown/{asked}",
        lambda: (
            Turn(
                asked,
                f"{_firm(refusals, dice)} {_firm(_KNOWS, dice)}",
                "I do not know." if refusals is _DOES_NOT_KNOW else "I cannot do that.",
            ),
        ),
    )


def _firm(answers: tuple[str, ...], dice: Dice) -> str:
    """The first more often than the others, so that it is what a model says that does not draw."""
    return answers[0] if dice.chance(0.5) else dice.pick(answers)


def _filled(pattern: str, dice: Dice) -> str:
    made = dice.pick(_ONSETS) + dice.pick(_NUCLEI) + dice.pick(_CODAS)
    first = dice.pick(SHE_NAMES + HE_NAMES)
    return pattern.format(
        country=dice.pick(_COUNTRIES),
        year=dice.between(1200, 2024),
        cup=dice.pick(_CUPS),
        device=dice.pick(_DEVICES),
        person=f"{first} {dice.pick(_LAST)}",
        topic=dice.pick(_TOPICS),
        title=dice.pick(_TITLES),
        city=dice.pick(_CITIES),
        mount=dice.pick(_MOUNTS),
        sea=dice.pick(_SEAS),
        made=made,
        a_made=a(made),
        stock=dice.pick(_STOCKS),
        big=dice.between(200, 9999),
        big2=dice.between(200, 9999),
        word=dice.pick(GROUPS[dice.pick(("animals", "foods", "tools", "feelings"))]),
        language=dice.pick(_LANGUAGES),
        code=dice.pick(_CODE),
        first=first,
    )
