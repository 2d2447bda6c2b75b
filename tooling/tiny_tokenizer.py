"""A byte-level BPE tokenizer trained on the spot, for models that `tooling.model_factory` makes.

Invariants: any UTF-8 text round-trips; every id below `vocab_size` decodes to text, so whatever a random model draws can
be shown; the same size gives the same tokenizer on every machine. Entries beyond what training learns are made-up words
that no merge reaches: they are never produced by encoding, only by drawing.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, SYSTEM, USER, ASSISTANT)
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

_LEARNED_ENTRIES = 4096
_WORDS = (
    "the of and to in a is that it was for on are as with they be at one have this from or had by not but what all were "
    "when we there can an your which their said if do will each about how up out them then she many some so these would "
    "other into has more her two like him see time could no make than first been its who now people my made over did down "
    "only way find use may water long little very after words called just where most know model token cache prompt answer"
)
_ONSETS = ("b", "br", "c", "ch", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z")
_NUCLEI = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("", "", "", "l", "n", "r", "s", "m", "nd", "rk")

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(vocab_size: int, model_max_length: int) -> PreTrainedTokenizerFast:
    """A tokenizer of exactly `vocab_size` entries with bos, eos, pad and a chat template.

    Raises:
        ValueError: `vocab_size` is below `MIN_VOCAB_SIZE` (the bytes and the special tokens).
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"Got {vocab_size = } but expected at least {MIN_VOCAB_SIZE}")
    tokenizer = Tokenizer(_filled(_learned(min(vocab_size, _LEARNED_ENTRIES)), vocab_size))
    _dress(tokenizer)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=PAD,  # bytes are never unknown, but some classes (Qwen2's) add a token of their own where this is unset
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _dress(tokenizer: Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()


def _learned(vocab_size: int) -> dict[str, Any]:
    """The BPE model (`vocab` and `merges`) that training on a generated corpus gives, as JSON data."""
    tokenizer = Tokenizer(models.BPE())
    _dress(tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model


def _filled(learned: dict[str, Any], vocab_size: int) -> models.BPE:
    vocab, merges = learned["vocab"], learned["merges"]
    words = _made_up_words(random.Random(1))
    while len(vocab) < vocab_size:
        vocab.setdefault("Ġ" + next(words), len(vocab))
    return models.BPE(vocab=vocab, merges=[(left, right) for left, right in merges])


def _corpus(sentences: int = 2000) -> Iterator[str]:
    rng = random.Random(0)
    common = _WORDS.split()
    invented = _made_up_words(rng)
    rare = [next(invented) for _ in range(1500)]
    for _ in range(sentences):
        words = [rng.choice(common) if rng.random() < 0.7 else rng.choice(rare) for _ in range(rng.randint(4, 12))]
        yield " ".join(words).capitalize() + rng.choice((".", "?", "!", ","))


def _made_up_words(rng: random.Random) -> Iterator[str]:
    while True:
        yield "".join(rng.choice(_ONSETS) + rng.choice(_NUCLEI) + rng.choice(_CODAS) for _ in range(rng.randint(1, 4)))
