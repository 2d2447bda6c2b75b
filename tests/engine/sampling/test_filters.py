"""Floors against an obvious reference; what a bound makes unnecessary to sort is not sorted."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from core.sampling import SamplingParams
from engine.sampling import filters
from engine.sampling.filters import LogWeights, filtered, floor_on_host, floors
from engine.sampling.gumbel import peaks


def kept_by_reference(weights: list[float], p: SamplingParams) -> set[int]:
    """One filter after the other, over all tokens sorted."""
    mass = {token: math.exp(weight) for token, weight in enumerate(weights)}
    mass = {token: m for token, m in mass.items() if m >= p.min_p}
    if 0 < p.top_k < len(weights):
        floor = sorted((mass.get(token, 0.0) for token in range(len(weights))), reverse=True)[p.top_k - 1]
        mass = {token: m for token, m in mass.items() if m >= floor}
    if p.top_p < 1:
        held, floor, total = 0.0, math.inf, math.fsum(mass.values())
        for m in sorted(mass.values(), reverse=True):
            if held >= p.top_p * total:
                break
            held, floor = held + m, m
        mass = {token: m for token, m in mass.items() if m >= floor}
    return set(mass)


def kept(weights: torch.Tensor, floor: float) -> set[int]:
    return set((weights >= floor).nonzero()[:, 0].tolist())


def on_host(scores: torch.Tensor, params: SamplingParams) -> float:
    return floor_on_host(scores.numpy(), peaks(scores[None])[0].numpy(), params)


SHAPES = {
    "flat": lambda n, g: torch.randn(n, generator=g) * 0.3,
    "peaked": lambda n, g: torch.randn(n, generator=g) * 3,
    "ties": lambda n, g: torch.randint(-8, 1, (n,), generator=g) / 2,
    "few": lambda n, g: torch.where(torch.rand(n, generator=g) < 0.02, torch.randn(n, generator=g), -math.inf).index_fill_(
        0, torch.tensor([0]), 0.5
    ),
}


@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(SHAPES)),
    st.sampled_from([1, 2, 65, 300, 3000]),
    st.sampled_from([0, 1, 3, 40, 1500, 10**6]),
    st.sampled_from([0.0137, 0.331, 0.8713, 0.9991, 1.0]),
    st.sampled_from([0.0, 0.0131, 0.313]),
    st.integers(0, 2**31),
)
def test_floors_keep_what_the_obvious_filters_keep(shape, vocab, top_k, top_p, min_p, seed):
    generator = torch.Generator().manual_seed(seed)
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=0.83)
    scores = torch.stack([SHAPES[shape](vocab, generator) for _ in range(2)])
    weights = LogWeights.of(scores.amax(dim=1), [params] * 2)(scores)
    expected = [kept_by_reference(row.tolist(), params) for row in weights]
    if not filtered(params, vocab):
        assert all(
            len(tokens) == int((row > -math.inf).sum()) or shape == "few" for tokens, row in zip(expected, weights, strict=True)
        )
        return
    looked = [on_host(row, params) for row in scores]
    never_waited = floors(weights, [params] * 2)
    for row in range(2):
        finite = {token for token in expected[row] if weights[row, token] > -math.inf}
        assert {token for token in kept(weights[row], looked[row]) if weights[row, token] > -math.inf} == finite
        assert {token for token in kept(weights[row], float(never_waited[row])) if weights[row, token] > -math.inf} == finite


def test_rows_with_unlike_filters_are_cut_as_they_are_alone():
    options = [
        {"top_k": 5},
        {"top_k": 2000},
        {"top_p": 0.5},
        {"top_k": 2000, "top_p": 0.7},
        {"top_k": 9, "top_p": 0.7},
        {"top_k": 1},
        {"min_p": 0.2},
        {"top_k": 2, "top_p": 0.9, "min_p": 0.01},
    ]
    params = [SamplingParams(**option) for option in options]
    scores = torch.randn(len(params), 3000, generator=torch.Generator().manual_seed(0))
    weights = LogWeights.of(scores.amax(dim=1), params)(scores)
    together = floors(weights, params)
    assert together.tolist() == [floors(weights[i : i + 1], [p]).item() for i, p in enumerate(params)]
    sizes = [len(kept(weights[i], float(together[i]))) for i in range(len(params))]
    assert [sizes[i] for i in (0, 1, 5)] == [5, 2000, 1]


def test_a_row_without_top_p_loses_no_tail_beside_one_with_it():
    weights = torch.tensor([[0.0, -50.0, -60.0, -70.0, -80.0]] * 2)
    assert floors(weights, [SamplingParams(top_k=4), SamplingParams(top_k=4, top_p=0.5)]).tolist() == [-70.0, 0.0]


def sorted_sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    real = np.sort

    def counted(values: np.ndarray) -> np.ndarray:
        sizes.append(values.size)
        return real(values)

    monkeypatch.setattr(filters.np, "sort", counted)
    return sizes


def test_top_p_sorts_only_the_head_that_a_bound_leaves(monkeypatch):
    sizes = sorted_sizes(monkeypatch)
    scores = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    scores[:8] += 16
    on_host(scores, SamplingParams(top_p=0.9))
    assert len(sizes) == 1
    assert sizes[0] < 5_000


def test_top_p_within_top_k_sorts_no_more_than_top_k_left(monkeypatch):
    sizes = sorted_sizes(monkeypatch)
    on_host(torch.randn(100_000, generator=torch.Generator().manual_seed(1)), SamplingParams(top_p=0.9, top_k=50))
    assert sizes
    assert max(sizes) <= 50


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_that_is_not_finite_has_some_floor(bad):
    scores = torch.zeros(300)
    scores[7] = bad
    assert on_host(scores, SamplingParams(top_p=0.9, top_k=3)) == -math.inf
    assert on_host(torch.full((300,), -math.inf), SamplingParams(top_p=0.9, top_k=3)) == -math.inf
