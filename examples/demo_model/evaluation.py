"""What a trained model can do, measured on its exported folder: held-out perplexity beside a unigram model's, and greedy answers.

Held-out documents are read one by one, each from its own beginning, and every token but the first is asked for. The unigram
model is asked for the same tokens; it was fitted on the tokens that training read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from examples.demo_model import corpus
from examples.demo_model.corpus import Split
from examples.demo_model.packing import Tokens
from examples.demo_model.prompts import MAX_NEW_TOKENS, PROMPTS, Prompt
from examples.demo_model.tokenizer import PAD_ID, as_chat, encode

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OVERALL = "all"
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Score:
    """Losses in nats a token over the held-out documents of one kind."""

    kind: str
    documents: int
    tokens: int
    loss: float
    unigram_loss: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def unigram_perplexity(self) -> float:
        return math.exp(self.unigram_loss)

    def as_json(self) -> dict[str, Any]:
        said = {"loss": self.loss, "perplexity": self.perplexity, "unigram_perplexity": self.unigram_perplexity}
        return {"documents": self.documents, "tokens": self.tokens} | {name: round(value, 4) for name, value in said.items()}


@dataclass(frozen=True)
class Answer:
    """A greedy answer. `ids` end with the end token if `finished`; `smallest_gap` is the least by which a drawn token's logit
    led the next best one's: below the rounding noise of a dtype, another machine may draw another token."""

    ids: tuple[int, ...]
    text: str
    finished: bool
    smallest_gap: float


def unigram(tokens: Tokens, vocab_size: int) -> npt.NDArray[np.float64]:
    """`[vocab_size]` losses in nats of a model that knows how often each token occurs in `tokens`, with one added to each."""
    counts = np.bincount(tokens, minlength=vocab_size).astype(np.float64) + 1.0
    losses: npt.NDArray[np.float64] = -np.log(counts / counts.sum())
    return losses


def scores(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int, train: Tokens, documents: int) -> list[Score]:
    """One for each kind among the first held-out documents, and one over all of them, which comes last."""
    drawn = list(islice(corpus.documents(seed, Split.HELD_OUT), documents))
    rows = [row[: model.config.max_position_embeddings] for row in encode(tokenizer, drawn)]
    frequencies = unigram(train, model.config.vocab_size)
    losses = document_losses(model, rows)
    unigrams = [float(frequencies[row[1:]].sum()) for row in rows]
    made = []
    for kind in [*sorted({document.kind for document in drawn}), OVERALL]:
        chosen = [at for at, document in enumerate(drawn) if kind in (document.kind, OVERALL)]
        count = sum(len(rows[at]) - 1 for at in chosen)
        made.append(
            Score(
                kind=kind,
                documents=len(chosen),
                tokens=count,
                loss=sum(losses[at] for at in chosen) / count,
                unigram_loss=sum(unigrams[at] for at in chosen) / count,
            )
        )
    return made


def document_losses(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[float]:
    """The summed loss of each row, in nats, read by itself from its first token, which is given."""
    losses = [0.0] * len(rows)
    by_length = sorted(range(len(rows)), key=lambda at: len(rows[at]))
    while by_length:
        together = max(_BATCH_TOKENS // len(rows[by_length[-1]]), 1)
        chosen, by_length = by_length[-together:], by_length[:-together]
        longest = max(len(rows[at]) for at in chosen)
        ids = torch.full((len(chosen), longest), PAD_ID)
        for line, at in enumerate(chosen):
            ids[line, : len(rows[at])] = torch.tensor(rows[at])
        with torch.inference_mode():
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()  # padding comes last: nobody sees it
            each = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        for line, at in enumerate(chosen):
            losses[at] = float(each[line, : len(rows[at]) - 1].double().sum())
    return losses


def answers(folder: Path, dtype: str, prompts: Sequence[Prompt] = PROMPTS) -> list[tuple[list[int], Answer]]:
    """Each prompt's ids and its greedy answer by `transformers` itself, from the exported folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype]).eval()
    return [(ids := prompt_ids(tokenizer, prompt), _answer(model, tokenizer, ids)) for prompt in prompts]


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> list[int]:
    """As a server makes them: a chat through its template, a text with what the tokenizer puts around it."""
    if not prompt.messages:
        ids: list[int] = tokenizer(prompt.text).input_ids
        return ids
    text = tokenizer.apply_chat_template(as_chat(prompt.messages), tokenize=False, add_generation_prompt=True)
    rendered: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return rendered


def _answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> Answer:
    given = torch.tensor([ids])
    with torch.inference_mode():
        out = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=MAX_NEW_TOKENS,
            return_dict_in_generate=True,
            output_logits=True,
        )
    drawn = out.sequences[0, len(ids) :].tolist()
    gaps = [float(best[0] - best[1]) for best in (logits[0].float().topk(2).values for logits in out.logits)]
    finished = drawn[-1] == model.generation_config.eos_token_id
    return Answer(tuple(drawn), tokenizer.decode(drawn, skip_special_tokens=True), finished, min(gaps))
