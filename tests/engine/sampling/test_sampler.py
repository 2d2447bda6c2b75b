"""The sampler against a slow, obvious reference; its draws depend on the row, its seed and its position alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.sampling import SamplingParams
from engine.plan import Drawn
from engine.sampling.sampler import Sampler
from tests.support.gumbel import reference_gumbel
from tests.support.recorders import TapeRecorder

VOCAB = 48
EOS = 2


@dataclass(frozen=True)
class Row:
    """A generation that is about to draw."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    sampling: SamplingParams

    @property
    def output(self) -> tuple[int, ...]:
        return self.tokens[self.prompt_tokens :]


def row(prompt: tuple[int, ...] = (5, 6, 7), output: tuple[int, ...] = (), **params: object) -> Row:
    sampling = SamplingParams(**{"max_tokens": 100, **params})
    return Row((*prompt, *output), len(prompt), sampling)


def read(logits: torch.Tensor, rows: list[Row], looks: bool | None = None) -> tuple[tuple[Drawn, ...], dict[int, str]]:
    sampler = Sampler(logits.shape[-1], frozenset([EOS]), looks=looks)
    for number, one in enumerate(rows):
        sampler.admit(number, one.tokens, one.prompt_tokens, one.sampling)
    return sampler.draw(logits, range(len(rows)), [len(one.output) for one in rows]).read()


def sample(logits: torch.Tensor, rows: list[Row], looks: bool | None = None) -> list[int]:
    return [drawn.token for drawn in read(logits, rows, looks)[0]]


def adjusted(logits: list[float], s: Row) -> list[float]:
    """Penalties, bias and the minimum length, one token at a time."""
    p, output = s.sampling, s.output
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


def reference_draw(logits: list[float], s: Row) -> int:
    """Rejects, through `assume`, cases where rounding decides."""
    scores, p = adjusted(logits, s), s.sampling
    if p.greedy:
        best = sorted(scores)[-2:]
        assume(best[1] - best[0] > 1e-5)
        return scores.index(best[1])
    weights = [math.exp((score - max(scores)) / p.temperature) for score in scores]
    sets = [kept(weights, p, min(1.0, max(0.0, p.top_p + nudge))) for nudge in ((0.0, -1e-6, 1e-6) if p.top_p < 1 else (0.0,))]
    assume(all([w > 0 for w in other] == [w > 0 for w in sets[0]] for other in sets))
    reached = {
        token: (scores[token] - max(scores)) / p.temperature + reference_gumbel(p.seed, len(s.output), token)
        for token, weight in enumerate(sets[0])
        if weight > 0
    }
    first, second = sorted([*reached.values(), -math.inf], reverse=True)[:2]
    assume(first - second > 1e-4)
    return max(reached, key=reached.__getitem__)


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


@pytest.mark.parametrize("looks", [True, False])
@settings(max_examples=150, deadline=None)
@given(st.lists(quarters, min_size=VOCAB, max_size=VOCAB), params, st.lists(tokens, max_size=6))
def test_a_token_is_the_one_that_the_obvious_reference_draws(looks, logits, options, output):
    s = row(output=tuple(output), **options)
    assert sample(torch.tensor([logits]), [s], looks) == [reference_draw(logits, s)]


@pytest.mark.parametrize("looks", [True, False])
@settings(max_examples=30, deadline=None)
@given(st.lists(params, min_size=2, max_size=9), st.integers(0, 2**31))
def test_a_row_draws_the_same_alone_and_in_a_crowd(looks, options, seed):
    logits = torch.randn(len(options), VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    rows = [row(output=tuple(range(i)), **option) for i, option in enumerate(options)]
    alone = [sample(logits[i : i + 1], [s], looks)[0] for i, s in enumerate(rows)]
    assert sample(logits, rows, looks) == sample(logits, rows, not looks) == alone


MIXED = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50},
    {"top_k": 2000, "top_p": 0.8, "min_p": 0.001},
    {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"logit_bias": {3: 9.0, 8: -100.0}, "min_tokens": 4, "logprobs": 3},
    {"min_p": 0.1, "frequency_penalty": -0.5, "repetition_penalty": 0.8, "logprobs": 0},
    {"temperature": 1e-40, "top_k": 3},
]


@pytest.mark.parametrize("vocab", [400, 4096, 300_001])
def test_draws_do_not_depend_on_how_rows_are_portioned_or_on_who_may_look(vocab):
    logits = torch.randn(len(MIXED), vocab, generator=torch.Generator().manual_seed(0)) * 3
    rows = [row(output=(1, 2, 1), seed=i, **options) for i, options in enumerate(MIXED)]
    alone = [sample(logits[i : i + 1], [s])[0] for i, s in enumerate(rows)]
    assert sample(logits, rows, looks=True) == sample(logits, rows, looks=False) == alone


@pytest.mark.parametrize("options", [MIXED, MIXED[1:2], MIXED[:1], MIXED[:3]])
def test_drawing_never_waits_for_the_device(options):
    """A tape breaks where the host must know a value; on a GPU that is where it would wait."""
    logits = torch.randn(len(options), 500).bfloat16()
    rows = [row(output=(1, 2), seed=i, **option) for i, option in enumerate(options)]
    sampler, draws = Sampler(500, frozenset([EOS]), looks=False), []
    for number, one in enumerate(rows):
        sampler.admit(number, one.tokens, one.prompt_tokens, one.sampling)
    TapeRecorder().record(lambda: draws.append(sampler.draw(logits, range(len(rows)), [2] * len(rows))))
    assert draws[0].tokens.tolist() == sample(logits, rows)


def test_tokens_drawn_here_count_without_the_host_knowing_them():
    """Step after step; at each, a sampler that is told the whole history draws the same."""
    options = {"temperature": 1.0, "repetition_penalty": 1.5, "frequency_penalty": 1.0, "presence_penalty": 0.5, "seed": 3}
    sampler, history = Sampler(VOCAB, frozenset()), [5, 6]
    sampler.admit(4, history, 2, SamplingParams(**options))
    for position in range(30):
        logits = torch.linspace(0, 2, VOCAB)[None]
        expected = sample(logits, [row((5, 6), tuple(history[2:]), **options)])
        history.append(int(sampler.draw(logits, [4], [position]).tokens))
        assert history[-1:] == expected


def test_a_row_admitted_again_equals_one_that_never_left_and_takes_nothing_from_the_one_before():
    options = {"temperature": 1.0, "repetition_penalty": 3.0, "frequency_penalty": 2.0, "seed": 8}
    logits = torch.linspace(0, 3, VOCAB)[None]
    sampler = Sampler(VOCAB, frozenset())
    sampler.admit(0, [40, 41, 42, 43, 44, 45], 1, SamplingParams(**options))
    sampler.draw(logits, [0], [5])
    for output in ((), (47, 46), (47, 46, 47, 47)):
        sampler.admit(0, [5, 6, *output], 2, SamplingParams(**options))
        assert sampler.draw(logits, [0], [len(output)]).tokens.tolist() == sample(logits, [row((5, 6), output, **options)])


def test_a_number_used_again_keeps_nothing_of_what_it_stood_for():
    sampler, logits = Sampler(VOCAB, frozenset()), torch.zeros(1, VOCAB)
    logits[0, 9] = 1.0
    sampler.admit(0, [5, 9], 1, SamplingParams(temperature=0.0, presence_penalty=2.0, repetition_penalty=9.0))
    assert int(sampler.draw(logits, [0], [1]).tokens) != 9
    sampler.admit(0, [5, 9], 1, SamplingParams(temperature=0.0))
    assert int(sampler.draw(logits, [0], [1]).tokens) == 9


def test_a_row_that_is_not_admitted_cannot_draw():
    sampler = Sampler(VOCAB, frozenset())
    sampler.admit(1, [5], 1, SamplingParams())
    sampler.drop(1)
    sampler.drop(1)
    with pytest.raises(KeyError):
        sampler.draw(torch.zeros(1, VOCAB), [1], [0])


def test_no_rows_draw_nothing():
    assert Sampler(VOCAB, frozenset()).draw(torch.zeros(0, VOCAB), [], []).read() == ((), {})


def test_ends_are_masked_until_the_position_reaches_min_tokens():
    logits = torch.zeros(1, VOCAB)
    logits[0, EOS], logits[0, 9], logits[0, 20] = 3.0, 2.0, 1.0
    sampler = Sampler(VOCAB, frozenset([EOS]))
    sampler.admit(0, [5], 1, SamplingParams(temperature=0.0, min_tokens=2, max_tokens=5, stop_token_ids=(9, VOCAB + 3)))
    assert [int(sampler.draw(logits, [0], [position]).tokens) for position in range(4)] == [20, 20, EOS, EOS]


def test_drawn_frequencies_follow_the_filtered_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, -1.0]])
    draws = 4000
    rows = [row(temperature=2.0, top_k=4, seed=seed) for seed in range(draws)]
    got = torch.bincount(torch.tensor(sample(logits.expand(draws, -1), rows)), minlength=5).double()
    assert got[4] == 0
    expected = (logits[0, :4].double() / 2).softmax(0) * draws
    chi_square = float(((got[:4] - expected) ** 2 / expected).sum())
    assert chi_square < 21.1, "3 degrees of freedom exceed this once in ten thousand times"


def test_a_seed_draws_by_output_position_whatever_was_already_delivered():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(3))
    at_once = row(prompt=(5, 6), output=(9, 9), temperature=1.5, seed=11)
    resumed = row(prompt=(5, 6, 1, 2), output=(9, 9), temperature=1.5, seed=11)
    assert sample(logits, [at_once]) == sample(logits, [resumed])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("looks", [True, False])
def test_a_row_that_is_not_finite_is_a_fault_of_that_row_alone(bad, temperature, looks):
    logits = torch.randn(4, VOCAB, generator=torch.Generator().manual_seed(1))
    rows = [row(temperature=temperature, seed=i, top_p=0.5, logprobs=2) for i in range(4)]
    healthy = sample(logits, rows)
    logits[2, 7] = bad
    drawn, faults = read(logits, rows, looks)
    assert faults == {2: "the logits are not finite"}
    assert [d.token for d in drawn] == [*healthy[:2], -1, healthy[3]]
    assert drawn[2].logprobs is None
    assert drawn[1].logprobs is not None


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {}, {"top_k": 4, "top_p": 0.5}])
@pytest.mark.parametrize("looks", [True, False])
def test_a_row_of_minus_infinity_is_a_fault(options, looks):
    logits = torch.full((1, VOCAB), -math.inf)
    assert list(read(logits, [row(**options)], looks)[1]) == [0]


def test_a_bias_on_a_token_outside_the_vocabulary_is_a_fault_that_names_it():
    logits = torch.randn(2, VOCAB)
    rows = [row(temperature=0.0), row(temperature=0.0, logit_bias={VOCAB: 1.0})]
    drawn, faults = read(logits, rows)
    assert list(faults) == [1]
    assert str(VOCAB) in faults[1]
    assert [one.token for one in drawn] == [int(logits[0].argmax()), -1]


def test_logprobs_are_those_of_the_raw_distribution_best_first():
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(5)) * 2
    s = row(temperature=0.3, seed=1, logprobs=4, logit_bias={3: 100.0})
    drawn = read(logits, [s])[0][0]
    expected = logits[0].log_softmax(0)
    assert drawn.token == 3
    assert drawn.logprobs is not None
    assert drawn.logprobs.logprob == pytest.approx(float(expected[3]), abs=1e-6)
    values, ids = expected.topk(4)
    assert [token for token, _ in drawn.logprobs.top] == ids.tolist()
    assert [value for _, value in drawn.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_each_row_gets_as_many_alternatives_as_it_asked_for():
    logits = torch.randn(3, VOCAB)
    rows = [row(temperature=0.0, logprobs=n) for n in (0, None, 5)]
    drawn, _ = read(logits, rows)
    assert [None if d.logprobs is None else len(d.logprobs.top) for d in drawn] == [0, None, 5]


def test_the_callers_logits_are_left_as_they_were():
    logits = torch.randn(2, VOCAB)
    before = logits.clone()
    sample(logits, [row(temperature=0.0, logit_bias={1: 5.0}), row(temperature=1.0, top_k=3, repetition_penalty=2.0)])
    assert torch.equal(logits, before)
