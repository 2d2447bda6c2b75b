"""The sampler against a slow, obvious reference; its draws depend on the row, its seed and its position alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.sampling import SamplingParams
from engine.sampler import Sampler, uniform
from engine.sequence import Sequence

VOCAB = 48
EOS = 2


def sequence(prompt: tuple[int, ...] = (5, 6, 7), output: tuple[int, ...] = (), **params: object) -> Sequence:
    sampling = SamplingParams(**{"max_tokens": 100, **params})  # type: ignore[arg-type]
    return Sequence("s", [*prompt, *output], len(prompt), sampling)


def sample(logits: torch.Tensor, sequences: list[Sequence]) -> list[int]:
    return [drawn.token for drawn in Sampler(logits.shape[-1], frozenset([EOS])).sample(logits, sequences).drawn]


def adjusted(logits: list[float], s: Sequence) -> list[float]:
    """Penalties, bias and the minimum length, one token at a time."""
    p, output = s.sampling, s.tokens[s.prompt_tokens :]
    scores = []
    for token, score in enumerate(logits):
        if token in s.tokens:
            score = score / p.repetition_penalty if score > 0 else score * p.repetition_penalty
        if token in output:
            score -= p.frequency_penalty * output.count(token) + p.presence_penalty
        score += p.logit_bias.get(token, 0.0)
        if len(output) < p.min_tokens and (token == EOS or token in p.stop_token_ids):
            score = -math.inf
        scores.append(score)
    return scores


def kept(weights: list[float], p: SamplingParams, top_p: float) -> list[float]:
    weights = [w if w >= p.min_p * max(weights) else 0.0 for w in weights]
    if 0 < p.top_k < len(weights):
        floor = sorted(weights)[-p.top_k]
        weights = [w if w >= floor else 0.0 for w in weights]
    if top_p < 1:
        mass, floor = 0.0, max(weights)
        for w in sorted(weights, reverse=True):
            if mass >= top_p * sum(weights):
                break
            mass, floor = mass + w, w
        weights = [w if w >= floor else 0.0 for w in weights]
    return weights


def reference_draw(logits: list[float], s: Sequence) -> int:
    """Rejects, through `assume`, cases where rounding decides."""
    scores, p = adjusted(logits, s), s.sampling
    if p.greedy:
        best = sorted(scores)[-2:]
        assume(best[1] - best[0] > 1e-5)
        return scores.index(best[1])
    weights = [math.exp((score - max(scores)) / p.temperature) for score in scores]
    sets = [kept(weights, p, min(1.0, max(0.0, p.top_p + nudge))) for nudge in ((0.0, -1e-6, 1e-6) if p.top_p < 1 else (0.0,))]
    assume(all([w > 0 for w in other] == [w > 0 for w in sets[0]] for other in sets))
    target, mass = uniform(p.seed, s.output_tokens) * sum(sets[0]), 0.0
    for token, weight in enumerate(sets[0]):
        mass += weight
        if mass > target:
            assume(min(mass - target, target - (mass - weight)) > 1e-6)
            return token
    raise AssertionError("a uniform below 1 stays below the total")


tokens = st.integers(0, VOCAB - 1)
quarters = st.integers(-40, 40).map(lambda n: n / 4)
params = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.1, 0.7, 1.0, 3.0]),
        "top_k": st.sampled_from([0, 1, 2, 7, VOCAB, 1000]),
        "top_p": st.sampled_from([0.05, 0.33, 0.87, 1.0]),
        "min_p": st.sampled_from([0.0, 0.013, 0.31]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.7]),
        "presence_penalty": st.sampled_from([0.0, 0.6, -1.1]),
        "frequency_penalty": st.sampled_from([0.0, 0.4, -0.3]),
        "logit_bias": st.dictionaries(tokens, quarters, max_size=3),
        "min_tokens": st.sampled_from([0, 2, 50]),
        "stop_token_ids": st.lists(tokens, max_size=2).map(tuple),
        "seed": st.integers(0, 2**63 - 1),
    }
)


@settings(max_examples=150, deadline=None)
@given(st.lists(quarters, min_size=VOCAB, max_size=VOCAB), params, st.lists(tokens, max_size=6))
def test_a_token_is_the_one_that_the_obvious_reference_draws(logits, options, output):
    s = sequence(output=tuple(output), **options)
    assert sample(torch.tensor([logits]), [s]) == [reference_draw(logits, s)]


@settings(max_examples=30, deadline=None)
@given(st.lists(params, min_size=2, max_size=9), st.integers(0, 2**31))
def test_a_row_draws_the_same_alone_and_in_a_crowd(options, seed):
    logits = torch.randn(len(options), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    sequences = [sequence(output=tuple(range(i)), **option) for i, option in enumerate(options)]
    assert sample(logits, sequences) == [sample(logits[i : i + 1], [s])[0] for i, s in enumerate(sequences)]


@pytest.mark.parametrize("vocab", [400, 300_000])
def test_draws_do_not_depend_on_how_rows_are_portioned(vocab):
    logits = torch.randn(5, vocab, generator=torch.Generator().manual_seed(0)) * 3
    sequences = [sequence(temperature=1.0, seed=i, top_p=0.9 if i % 2 else 1.0) for i in range(5)]
    assert sample(logits, sequences) == [sample(logits[i : i + 1], [s])[0] for i, s in enumerate(sequences)]


def test_drawn_frequencies_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]])
    draws = 4000
    sequences = [sequence(temperature=1.0, seed=seed) for seed in range(draws)]
    got = torch.bincount(torch.tensor(sample(logits.expand(draws, -1), sequences)), minlength=5).double()
    expected = logits[0].double().softmax(0) * draws
    chi_square = float(((got - expected) ** 2 / expected).sum())
    assert chi_square < 18.5, "4 degrees of freedom exceed this once in a thousand"


def test_successive_positions_draw_independently():
    pairs = [(uniform(seed, 0), uniform(seed, 1)) for seed in range(2000)]
    table = torch.tensor([[a, b] for a, b in pairs], dtype=torch.float64)
    assert abs(float(torch.corrcoef(table.T)[0, 1])) < 0.07
    assert all(0.0 <= u < 1.0 for pair in pairs for u in pair)
    assert abs(float(table.mean()) - 0.5) < 0.02


def test_uniforms_are_pinned_so_that_a_replay_on_another_version_draws_the_same():
    assert [uniform(0, 0), uniform(1, 0), uniform(2**63 - 1, 12345)] == [
        0.6524484863740322,
        0.36818951565166946,
        0.20420983728006326,
    ]


def test_a_seed_draws_by_output_position_whatever_was_already_delivered():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    at_once = sequence(prompt=(5, 6), output=(9, 9), temperature=1.5, seed=11)
    resumed = sequence(prompt=(5, 6, 1, 2), output=(9, 9), temperature=1.5, seed=11)
    assert sample(logits, [at_once]) == sample(logits, [resumed])


def test_the_top_uniform_still_picks_a_token_that_the_filters_kept(monkeypatch):
    monkeypatch.setattr("engine.sampler.uniform", lambda seed, position: 1.0 - 2.0**-53)
    logits = torch.zeros(1, VOCAB)
    logits[0, 20:] = -5.0
    assert sample(logits, [sequence(temperature=1.0, top_k=20)]) == [19]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_is_a_fault_of_that_row_alone(bad, temperature):
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    sequences = [sequence(temperature=temperature, seed=i, top_p=0.5, logprobs=2) for i in range(4)]
    healthy = sample(logits, sequences)
    logits[2, 7] = bad
    sampled = Sampler(VOCAB, frozenset([EOS])).sample(logits, sequences)
    assert sampled.faults == {2: "the logits are not finite"}
    assert [d.token for d in sampled.drawn] == [*healthy[:2], -1, healthy[3]]
    assert sampled.drawn[2].logprobs is None


def test_a_row_of_minus_infinity_is_a_fault():
    logits = torch.full((1, VOCAB), -math.inf)
    assert list(Sampler(VOCAB, frozenset()).sample(logits, [sequence(temperature=0.0)]).faults) == [0]


def test_a_bias_on_a_token_outside_the_vocabulary_is_a_fault_that_names_it():
    logits = torch.randn(2, VOCAB)
    sequences = [sequence(temperature=0.0), sequence(temperature=0.0, logit_bias={VOCAB: 1.0})]
    sampled = Sampler(VOCAB, frozenset()).sample(logits, sequences)
    assert list(sampled.faults) == [1]
    assert str(VOCAB) in sampled.faults[1]
    assert sampled.drawn[0].token == int(logits[0].argmax())


def test_logprobs_are_those_of_the_raw_distribution_best_first():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    s = sequence(temperature=0.3, seed=1, logprobs=4, logit_bias={3: 100.0})
    drawn = Sampler(VOCAB, frozenset()).sample(logits, [s]).drawn[0]
    expected = logits[0].log_softmax(0)
    assert drawn.token == 3
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(float(expected[3]), abs=1e-6)
    values, ids = expected.topk(4)
    assert [token for token, _ in drawn.logprobs.top] == ids.tolist()
    assert [value for _, value in drawn.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_each_row_gets_as_many_alternatives_as_it_asked_for():
    logits = torch.randn(3, VOCAB)
    sequences = [sequence(temperature=0.0, logprobs=n) for n in (0, None, 5)]
    drawn = Sampler(VOCAB, frozenset()).sample(logits, sequences).drawn
    assert [None if d.logprobs is None else len(d.logprobs.top) for d in drawn] == [0, None, 5]


def test_the_callers_logits_are_left_as_they_were():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    sample(logits, [sequence(temperature=0.0, logit_bias={1: 5.0}), sequence(temperature=1.0, top_k=3, repetition_penalty=2.0)])
    assert torch.equal(logits, before)
