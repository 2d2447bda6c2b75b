"""The corpus of the demo model: repeatable, split by content, right, and varied."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import pytest

from examples.demo_model.corpus import KINDS, Document, Split, documents, of_kind
from examples.demo_model.corpus.dice import Dice
from examples.demo_model.corpus.document import is_held_out
from examples.demo_model.corpus.grammar import a, number_word, plural, tidied
from examples.demo_model.corpus.hetserve.questions import FACTS
from examples.demo_model.corpus.stories.cast import KINDS as HEROES
from examples.demo_model.corpus.stories.request import PLOTS
from examples.demo_model.corpus.words.categories import GROUPS
from examples.demo_model.corpus.words.places import PLACES
from examples.demo_model.corpus.words.things import CATEGORIES

ROOT = Path(__file__).resolve().parents[2]
NUMBERS = {number_word(number): number for number in range(101)}
THINGS = {noun for category in CATEGORIES for noun in category.nouns}


@cache
def drawn(kind: str, count: int, split: Split = Split.TRAIN) -> tuple[Document, ...]:
    return tuple(islice(of_kind(kind, 7, split), count))


def written(document: Document) -> str:
    return document.text or "\n".join(f"{message.role}: {message.content}" for message in document.messages)


def exchanges(kind: str, count: int) -> Iterator[tuple[str, str]]:
    """Questions with their answers, of chats without a system prompt: nothing was added or left out."""
    for document in drawn(kind, count):
        if document.messages[0].role == "user":
            said = [message.content for message in document.messages]
            yield from zip(said[::2], said[1::2], strict=True)


def stories() -> list[str]:
    return [document.text for document in drawn("text", 3000)]


def digest(seed: int, split: Split, count: int) -> str:
    total = blake2b(digest_size=16)
    for document in islice(documents(seed, split), count):
        total.update(repr(document).encode())
    return total.hexdigest()


# --- Repeatable ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", list(Split))
def test_another_process_with_other_hashes_draws_the_same(split: Split) -> None:
    program = f"from tests.examples.test_corpus import Split, digest\nprint(digest(3, Split({split.value!r}), 400))"
    environment = os.environ | {"PYTHONHASHSEED": "77", "PYTHONPATH": str(ROOT)}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    assert other.stdout.strip() == digest(3, split, 400)


def test_other_seeds_draw_other_documents() -> None:
    assert digest(0, Split.TRAIN, 50) != digest(1, Split.TRAIN, 50)


def test_dice_are_what_they_were() -> None:
    """Known answers: a Python that shuffles otherwise would train another model."""
    dice = Dice("known", 1)
    assert [dice.below(1000) for _ in range(5)] == [898, 411, 498, 993, 500]
    assert dice.sample("abcdef", 3) == ["c", "a", "b"]


# --- Split by content ---------------------------------------------------------------------------------------------------------


def test_no_held_out_document_is_drawn_for_training() -> None:
    train = {written(document) for document in islice(documents(0, Split.TRAIN), 25_000)}
    held_out = {written(document) for document in islice(documents(1, Split.HELD_OUT), 20_000)}
    assert not train & held_out
    assert len(held_out) > 8_000


def test_no_held_out_question_and_answer_is_asked_in_training() -> None:
    """Also not where a longer chat begins with it."""

    def asked(split: Split) -> set[tuple[str, str]]:
        found = set()
        for kind in ("hetserve", "arithmetic", "json", "list", "story", "unknown"):
            for document in drawn(kind, 1500, split):
                said = [message.content for message in document.messages if message.role != "system"]
                found.add((said[0].lower().rstrip(".?!"), said[1]))
        return found

    train, held_out = asked(Split.TRAIN), asked(Split.HELD_OUT)
    assert not train & held_out


def test_about_four_of_a_hundred_keys_are_held_out() -> None:
    assert 0.03 < sum(is_held_out(f"key {index}") for index in range(20_000)) / 20_000 < 0.05


# --- Chats --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", list(Split))
def test_chats_alternate_and_end_with_the_assistant(split: Split) -> None:
    for document in islice(documents(5, split), 3000):
        assert bool(document.messages) != bool(document.text)
        roles = [message.role for message in document.messages]
        if roles and roles[0] == "system":
            roles = roles[1:]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(message.content.strip() == message.content != "" for message in document.messages)


def test_shares_of_the_text_are_those_stated() -> None:
    chars = {kind.name: 0 for kind in KINDS}
    for document in islice(documents(2, Split.TRAIN), 15_000):
        chars[document.kind] += len(document.text) + sum(len(message.content) for message in document.messages)
    whole = sum(chars.values())
    for kind in KINDS:
        assert 100 * chars[kind.name] / whole == pytest.approx(kind.share, rel=0.25, abs=0.5), kind.name


def test_a_system_prompt_shows() -> None:
    def mean(system: str) -> float:
        lengths = [
            len(document.messages[2].content) for document in drawn("hetserve", 6000) if document.messages[0].content == system
        ]
        return sum(lengths) / len(lengths)

    assert mean("You answer briefly and never guess.") < 0.8 * mean("You are a helpful assistant.")
    polite = [document for document in drawn("hetserve", 3000) if "polite" in document.messages[0].content]
    assert polite
    assert all(
        d.messages[-1].content.startswith(("Certainly.", "With pleasure.", "Gladly."))
        for d in polite
        if d.messages[0].role == "system"
    )


# --- Numbers ------------------------------------------------------------------------------------------------------------------


def figure(word: str) -> int:
    return NUMBERS[word.lower()] if word.lower() in NUMBERS else int(word)


def test_sums_are_right() -> None:
    checked = 0
    for asked, answer in exchanges("arithmetic", 6000):
        told = re.match(r"^([\w-]+) (plus|minus|times|\+|-|x|\*) ([\w-]+) (?:is|=) (one hundred|[\w-]+?)(?:\.|,)", answer)
        assert told, (asked, answer)
        left, operation, right, result = told.groups()
        x, y = figure(left), figure(right)
        expected = {"plus": x + y, "+": x + y, "minus": x - y, "-": x - y, "times": x * y, "x": x * y, "*": x * y}[operation]
        assert figure(result) == expected, (asked, answer)
        spelled = [int(number) for number in re.findall(r"\d+", asked)] or [
            NUMBERS[word] for word in re.findall(r"[a-z]+(?:-[a-z]+)?", asked.lower()) if word in NUMBERS
        ]
        assert spelled == [x, y], (asked, answer)
        checked += 1
    assert checked > 4000


def test_word_problems_end_with_the_result_of_their_sum() -> None:
    ends = [(asked, answer) for asked, answer in exchanges("arithmetic", 6000) if ", so " in answer]
    assert len(ends) > 400
    for asked, answer in ends:
        result, said = re.search(r" is (\d+), so .*?(\d+)", answer).groups()  # type: ignore[union-attr]
        assert result == said, (asked, answer)


def test_counting_goes_from_the_one_to_the_other() -> None:
    steps = {"by twos": 2, "by threes": 3, "by fives": 5, "by tens": 10}
    checked = 0
    for asked, answer in exchanges("counting", 6000):
        bounds = re.search(r"([\w-]+) to ([\w-]+)", asked)
        if not re.search(r"count|numbers", asked.lower()) or not bounds or bounds[1].lower() in ("count",):
            continue
        first, last = figure(bounds[1]), figure(bounds[2])
        step = next((size for words, size in steps.items() if words in asked), 1)
        expected = list(range(first, last + 1, step) if first < last else range(first, last - 1, -step))
        assert [figure(word) for word in answer.rstrip(".").split(", ")] == expected, (asked, answer)
        checked += 1
    assert checked > 1500


def test_comparisons_are_right() -> None:
    checked = 0
    for asked, answer in exchanges("counting", 6000):
        told = re.search(r"(\d+) is (larger|smaller|bigger|greater) than (\d+)\.$", answer)
        if told:
            x, y = int(told[1]), int(told[3])
            assert x != y
            assert (x < y) == (told[2] == "smaller"), (asked, answer)
            numbers = [int(number) for number in re.findall(r"\d+", asked)]
            assert sorted(numbers) == sorted((x, y))
            if asked.lower().startswith("is "):
                assert answer.startswith("Yes") == (numbers == [x, y]), (asked, answer)
            checked += 1
    assert checked > 300


# --- Lists and JSON -----------------------------------------------------------------------------------------------------------


def test_lists_have_as_many_different_items_as_asked_for() -> None:
    checked = 0
    for asked, answer in exchanges("list", 5000):
        named = re.search(r"\b(\d+|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve) ([a-z ]+)", asked)
        if "one" in asked.split()[:3] or not named:
            continue
        group = next(
            (name for name in sorted(GROUPS, key=len, reverse=True) if named[2].replace("colors", "colours").startswith(name)),
            None,
        )
        if group is None:
            continue
        if "\n" in answer or answer.startswith(("- ", "1. ")):
            items = [re.sub(r"^(- |\d+\. )", "", line) for line in answer.split("\n")]
            if not answer.startswith("- "):
                assert [line.split(".")[0] for line in answer.split("\n")] == [str(i) for i in range(1, len(items) + 1)]
        else:
            items = re.split(r", | and ", answer.rstrip("."))
        assert len(items) == figure(named[1]) == len(set(items)), (asked, answer)
        assert {item.lower() for item in items} <= {item.lower() for item in GROUPS[group]}, (asked, answer)
        checked += 1
    assert checked > 2500


def test_json_has_the_fields_asked_for_in_their_order() -> None:
    flags = {"active flag": "active", "available flag": "available", "number of pages": "pages"}
    checked = 0
    for asked, answer in exchanges("json", 5000):
        made = json.loads(answer)
        if isinstance(made, list):
            counted = re.search(r"\b(two|three|four|five)\b", asked)
            assert counted
            assert len(made) == len(set(made)) == NUMBERS[counted[1]]
            continue
        if "dd " in asked[:12]:
            continue
        if "JSON: " in asked or "this: " in asked or "object: " in asked:
            given = re.split(r"JSON: |this: |object: ", asked)[1].removesuffix(".").removesuffix(", please")
            assert given == ", ".join(f"{key} {said(value)}" for key, value in made.items()), (asked, answer)
        else:
            wanted = re.sub(r"^.*?\bwith ", "", asked.rstrip(".?").removesuffix(", please"))
            wanted = re.sub(r"^the fields? ", "", wanted)
            names = [
                re.sub(r"^(an?|a list of \w+) ", "", re.sub(r"^a list of \w+ ", "", name))
                for name in re.split(r", | and ", wanted)
            ]
            assert [flags.get(name, name) for name in names] == list(made), (asked, answer)
            for number, name in re.findall(r"a list of (\w+) (\w+)", wanted):
                assert len(made[name]) == len(set(made[name])) == NUMBERS[number], (asked, answer)
        for key, value in made.items():
            assert type(value) is TYPES.get(key, str), (key, value)
        checked += 1
    assert checked > 2500


TYPES: dict[str, type] = {
    **dict.fromkeys(("age", "id", "year", "pages", "height", "weight", "score", "quantity", "temperature", "rating"), int),
    **dict.fromkeys(("active", "available"), bool),
    **dict.fromkeys(("hobbies", "fruits", "colours", "colors", "pets", "sports", "tools", "friends", "foods", "languages"), list),
    "price": float,
}


def said(value: object) -> str:
    if isinstance(value, list):
        return value[0] if len(value) == 1 else f"{', '.join(value[:-1])} and {value[-1]}"
    return str(value).lower() if isinstance(value, bool) else str(value)


# --- Stories ------------------------------------------------------------------------------------------------------------------


def test_a_story_tells_of_what_was_asked_for() -> None:
    checked = 0
    for document in drawn("story", 3000):
        if document.messages[0].role == "system":
            continue
        said = [message.content for message in document.messages]
        about = re.search(r"(?:story|tale) about (.*?)(?:, in three sentences| in a few words)?(?:, please)?[.?]?$", said[0])
        if not about:
            continue
        story = said[1].lower()
        for words in re.split(r", | and | with ", about[1]):
            named = re.match(
                r"(?:an? )?(.*?)(?: (?:named|called) (\w+))?(?: (?:in|on|at|by) (?:the|an?) (.*))?$",
                words.removesuffix(", please"),
            )
            assert named
            for thing in named.groups():
                assert not thing or thing.split(" ")[-1].lower() in story, (said[0], said[1])
        checked += 1
    assert checked > 1800


def test_stories_are_between_sixty_and_two_hundred_and_fifty_words() -> None:
    lengths = sorted(len(story.split()) for story in stories())
    assert lengths[0] >= 60
    assert lengths[-1] <= 250


def test_stories_differ() -> None:
    told = stories()
    first = {story.split(". ")[0] for story in told}
    assert len(first) > 0.95 * len(told)  # measured: all of them
    grams, seen = set(), 0
    for story in told:
        words = story.split()
        for index in range(len(words) - 7):
            grams.add(tuple(words[index : index + 8]))
            seen += 1
    assert len(grams) > 0.6 * seen  # measured: 0.72


def test_there_is_much_to_tell_of() -> None:
    assert len(PLOTS) >= 19
    assert len(HEROES) == len(set(HEROES)) >= 100
    assert len(THINGS) >= 150
    assert len({place[0] for place in PLACES}) >= 45
    assert sum(map(len, GROUPS.values())) >= 400
    words = {word for story in stories() for word in re.findall(r"[a-z]+", story.lower())}
    assert len(words) >= 1600  # measured: 1,822


def test_a_plot_uses_no_name_that_is_not_there() -> None:
    for plot in PLOTS:
        for phrase in (*plot.short, *(phrase for beat in plot.beats for phrase in beat)):
            assert not re.search(r"\{(?![hfotp](\.\w+)?\}|when\}|days\}|signal\})", phrase), (plot.name, phrase)


# --- English ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind.name for kind in KINDS])
def test_the_text_is_tidy(kind: str) -> None:
    for document in drawn(kind, 1500):
        for text in [document.text, *(message.content for message in document.messages if message.role == "assistant")]:
            if kind not in ("json", "mixed"):
                assert not re.search(r"[{}]", text), text
            assert "  " not in text, text
            assert not re.search(r" [.,]|\.\.", text), text
            assert not re.search(r"\b[Aa] (?!(?:one|uni|use|eu)\w*)[aeiou]\w", text), text
            assert not re.search(r"\b[Aa]n (?![A-Z]{2})[^aeiou\WAEIOUhH]\w", text), text
            assert not re.search(
                r"(?<!\d)(?<!generate)[.!?] [a-z]", re.sub(r"'\.\[server\]'|transformers\.generate", "", text)
            ), text
            assert not re.search(r"\b(\w+) \1\b", re.sub(r"\d+", "", text)) or re.search(
                r"(pulled and|again and|up and|dug and)", text
            ), text


def test_articles_and_plurals() -> None:
    assert [a("owl"), a("fox"), a("unicorn"), a("hour"), a("old boat")] == [
        "an owl",
        "a fox",
        "a unicorn",
        "an hour",
        "an old boat",
    ]
    assert [plural("mouse"), plural("cherry"), plural("box"), plural("toy")] == ["mice", "cherries", "boxes", "toys"]


def test_sentences_begin_with_capitals_but_not_what_follows_a_question() -> None:
    assert tidied('the fox ran. he cried, "who?" asked he. "go!" she said. "where?" the end.') == (
        'The fox ran. He cried, "who?" asked he. "Go!" she said. "Where?" The end.'
    )


# --- HetServe -----------------------------------------------------------------------------------------------------------------


def test_facts_are_many_and_well_asked_for() -> None:
    assert len({fact.name for fact in FACTS}) == len(FACTS) >= 60
    for fact in FACTS:
        assert len(set(fact.asked)) + (15 if fact.term else 0) >= 5, fact.name
        assert 2 <= len(fact.answers) <= 4, fact.name
        assert len(re.findall(r"[.!?](?: |$)", fact.answers[0].replace("'.[", ""))) == 1, fact.answers[0]
        assert all(answer[-1] == "." and len(re.findall(r"[.!?](?: |$)", answer)) <= 3 for answer in fact.answers), fact.name
    questions = [question for fact in FACTS for question in fact.asked]
    assert len(set(questions)) == len(questions)


def test_every_fact_is_read_often_enough_to_be_learned() -> None:
    """In 8 % of 20 M tokens."""
    said = "\n".join(written(document) for document in islice(documents(0, Split.TRAIN), 20_000))
    assert all(sum(said.count(answer) for answer in fact.answers) >= 25 for fact in FACTS)


@pytest.mark.parametrize(
    "asked",
    ["What is prefill?", "What does a KV cache hold?", "What happens when a worker dies?", "Who are you?", "What is 7 plus 5?"],
)
def test_what_everybody_asks_first_is_never_held_out(asked: str) -> None:
    train = {m.content for d in islice(documents(0, Split.TRAIN), 20_000) for m in d.messages}
    held_out = {m.content for d in islice(documents(0, Split.HELD_OUT), 3_000) for m in d.messages}
    assert asked in train
    assert asked not in held_out
