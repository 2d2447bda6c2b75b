"""From documents to what a training step reads: one long row of token ids, kept on disk, cut into blocks.

The documents of a split, tokenised and laid end to end in the order in which they are drawn, are one endless *stream*. It
is cut without gaps or overlaps, so no token of any document is lost: step `n` of batches of `t` tokens reads
`stream[n * t : (n + 1) * t]` and is asked for `stream[n * t + 1 : (n + 1) * t + 1]`. A step number therefore says which
documents come, whatever came before it and however long the blocks are, and training can be resumed by number alone.

The stream is drawn ahead and cached (`Stream.open`), so that training waits for no generator. A cache knows from what it
was made; one that was made from something else is made again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerFast

from examples.demo_model import corpus
from examples.demo_model.corpus import Document, Split
from examples.demo_model.tokenizer import BOS_ID, encode

Tokens = npt.NDArray[np.uint16]

_BATCH_DOCUMENTS = 1000


@dataclass(frozen=True)
class Origin:
    """What a stream depends on: two streams of the same origin begin alike, however long they are."""

    seed: int
    split: str
    corpus: str
    tokenizer: str


@dataclass(frozen=True)
class Stream:
    """The first `len(tokens)` tokens of a split's stream.

    Attributes:
        tokens: `[n]` ids; the last document may be cut off.
    """

    tokens: Tokens

    @classmethod
    def open(cls, folder: Path, tokenizer: PreTrainedTokenizerFast, seed: int, split: Split, length: int) -> Stream:
        """At least `length` tokens of the stream: those cached in `folder` if they suffice, or drawn now and cached there."""
        origin = Origin(seed, split.name.lower(), corpus_digest(), tokenizer_digest(tokenizer))
        words, row = folder / f"{origin.split}.json", folder / f"{origin.split}.npy"
        if words.exists() and row.exists():
            said = json.loads(words.read_text())
            tokens = np.load(row)
            if said["origin"] == asdict(origin) and len(tokens) >= length and said["digest"] == _digest(tokens):
                return cls(tokens)
        tokens = draw(tokenizer, seed, split, length)
        folder.mkdir(parents=True, exist_ok=True)
        words.unlink(missing_ok=True)  # it vouches for the row, so it goes first and comes last
        np.save(row, tokens)
        words.write_text(json.dumps({"origin": asdict(origin), "digest": _digest(tokens)}, indent=2) + "\n")
        return cls(tokens)

    def documents(self, tokens: int) -> int:
        """How many begin among the first `tokens`."""
        return int(np.count_nonzero(self.tokens[:tokens] == BOS_ID))

    def batch(self, step: int, tokens: int, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets of a step, each `[tokens // block, block]` int64.

        Raises:
            ValueError: `tokens` is no multiple of `block`, or the stream ends before this step does.
        """
        begin, end = step * tokens, (step + 1) * tokens
        if tokens % block or end + 1 > len(self.tokens):
            raise ValueError(f"Got {step = } of {tokens} tokens in blocks of {block} but the stream has {len(self.tokens)}")
        part = torch.from_numpy(self.tokens[begin : end + 1].astype(np.int64))
        return part[:-1].view(-1, block), part[1:].view(-1, block)


def draw(tokenizer: PreTrainedTokenizerFast, seed: int, split: Split, length: int) -> Tokens:
    """The first `length` tokens of a split's stream."""
    rows: list[Tokens] = []
    held = 0
    for ids in _encoded(tokenizer, corpus.documents(seed, split)):
        rows.append(np.array(ids, dtype=np.uint16))
        held += len(ids)
        if held >= length:
            break
    return np.concatenate(rows)[:length]


def corpus_digest() -> str:
    """Of the files that the corpus is made by."""
    folder = Path(corpus.__file__).parent
    together = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        together.update(os.fsencode(file.relative_to(folder)) + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return together.hexdigest()


def tokenizer_digest(tokenizer: PreTrainedTokenizerFast) -> str:
    """Of all that decides what text becomes: vocabulary, merges, template."""
    return hashlib.sha256(f"{tokenizer.backend_tokenizer.to_str()}\0{tokenizer.chat_template}".encode()).hexdigest()


def _encoded(tokenizer: PreTrainedTokenizerFast, drawn: Iterator[Document]) -> Iterator[list[int]]:
    while batch := list(islice(drawn, _BATCH_DOCUMENTS)):
        yield from encode(tokenizer, batch)


def _digest(tokens: Tokens) -> str:
    return hashlib.sha256(tokens.tobytes()).hexdigest()
