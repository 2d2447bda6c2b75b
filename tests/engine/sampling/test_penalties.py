"""Counts are a function of a row's tokens; steps do not read the context again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from core.sampling import SamplingParams
from engine.sampling.penalties import Penalties
from engine.sampling.sampler import Sampler

VOCAB = 40
EVERYTHING = {"repetition_penalty": 1.3, "presence_penalty": 0.6, "frequency_penalty": 0.4}


def penalties() -> Penalties:
    return Penalties(VOCAB, torch.device("cpu"))


def penalised(kept: Penalties, rows: list[int]) -> torch.Tensor:
    scores = torch.linspace(-3, 5, VOCAB).repeat(len(rows), 1)
    kept.apply(scores, rows)
    return scores


def expected(tokens: list[int], prompt: int, p: SamplingParams) -> torch.Tensor:
    """One token at a time."""
    scores = torch.linspace(-3, 5, VOCAB)
    for token in set(tokens):
        scores[token] = scores[token] / p.repetition_penalty if scores[token] > 0 else scores[token] * p.repetition_penalty
    for token in set(tokens[prompt:]):
        scores[token] -= p.frequency_penalty * tokens[prompt:].count(token) + p.presence_penalty
    return scores


options = st.fixed_dictionaries(
    {
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.6, -1.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
    }
)
histories = st.lists(st.tuples(options, st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=12)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(histories, st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=5, max_size=5), max_size=6))
def test_rows_are_penalised_for_what_they_had_and_drew_and_equal_rows_admitted_anew(rows, drawn):
    lived, params = penalties(), [SamplingParams(**option) for option, _ in rows]
    histories = [list(tokens) for _, tokens in rows]
    prompts = [len(tokens) for tokens in histories]
    for row, tokens in enumerate(histories):
        lived.admit(row, tokens, prompts[row], params[row])
    for step in drawn:
        picked = step[: len(rows)]
        lived.count(range(len(rows)), torch.tensor(picked))
        for tokens, token in zip(histories, picked, strict=True):
            tokens.append(token)
    got = penalised(lived, list(range(len(rows))))
    anew = penalties()
    for row, tokens in enumerate(histories):
        assert torch.allclose(got[row], expected(tokens, prompts[row], params[row]), atol=1e-5)
        anew.admit(row, tokens, prompts[row], params[row])
    assert torch.equal(penalised(anew, list(range(len(rows)))), got)


def test_rows_without_penalties_keep_no_counts():
    kept = penalties()
    kept.admit(0, [1, 2], 1, SamplingParams(temperature=0.7))
    assert kept.kept == 0
    kept.admit(1, [1, 2], 1, SamplingParams(repetition_penalty=1.1))
    kept.admit(2, [1, 2], 1, SamplingParams(presence_penalty=0.1))
    assert kept.kept == 2
    kept.drop(1)
    kept.drop(2)
    kept.drop(0)
    assert kept.kept == 0


def test_a_row_that_left_leaves_nothing_to_the_next():
    kept = penalties()
    for row in range(5):
        kept.admit(row, [3, 4, 3], 1, SamplingParams(**EVERYTHING))
    kept.drop(2)
    kept.admit(9, [7], 1, SamplingParams(**EVERYTHING))
    assert torch.equal(penalised(kept, [9, 4]), torch.cat([penalised(kept, [9]), penalised(kept, [4])]))
    assert torch.allclose(penalised(kept, [9])[0], expected([7], 1, SamplingParams(**EVERYTHING)))
    assert torch.allclose(penalised(kept, [4])[0], expected([3, 4, 3], 1, SamplingParams(**EVERYTHING)))


def test_a_row_that_drew_nothing_counts_nothing():
    kept = penalties()
    kept.admit(0, [3], 1, SamplingParams(**EVERYTHING))
    before = penalised(kept, [0])
    kept.count([0], torch.tensor([-1]))
    assert torch.equal(penalised(kept, [0]), before)


class Work(TorchDispatchMode):
    """Counts tensor operations and the elements that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.elements = 0, 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        self.elements += sum(leaf.numel() for leaf in tree_leaves((args, result)) if isinstance(leaf, torch.Tensor))
        return result


@pytest.mark.parametrize("looks", [True, False])
def test_a_penalised_row_costs_the_same_at_any_context(looks):
    def work(context: int, vocab: int = 50_000, **options: float) -> Work:
        sampler = Sampler(vocab, frozenset(), looks=looks)
        sampler.admit(0, list(range(context)), context // 2, SamplingParams(temperature=0.0, **options))
        logits = torch.zeros(1, vocab)
        with Work() as counted:
            sampler.draw(logits, [0], [context - context // 2])
        return counted

    short, long, greedy = work(16, **EVERYTHING), work(16_384, **EVERYTHING), work(16_384)
    assert (short.operations, short.elements) == (long.operations, long.elements)
    assert long.elements - greedy.elements < 50 * 50_000, "a few passes over the vocabulary"
