"""The noise is exponential, independent, a function of its keys alone; both races name the token that all the noise names."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.sampling.filters import LogWeights
from engine.sampling.gumbel import BLOCK, _exponential, bits, noise, peaks, race, race_by_blocks, states, stream
from tests.support.gumbel import MASK, reference_gumbel, splitmix64


def unsigned(words: torch.Tensor) -> list[int]:
    return [word & MASK for word in words.tolist()]


def draws(seeds: list[int], positions: list[int]) -> torch.Tensor:
    return states(torch.tensor([stream(seed) for seed in seeds]), torch.tensor(positions))


def as_they_are(rows: int, floor: float = -math.inf) -> LogWeights:
    """Scores are log-weights already."""
    return LogWeights(torch.zeros(rows, 1), torch.ones(rows, 1), torch.full((rows, 1), floor))


def by_blocks(scores: torch.Tensor, keys: torch.Tensor, weigh: LogWeights) -> torch.Tensor:
    return race_by_blocks(scores, peaks(scores), keys, weigh)


def most(degrees: int) -> float:
    """What chi-square of that many degrees exceeds once in ten thousand times (Wilson and Hilferty, 1931)."""
    part = 2 / (9 * degrees)
    return degrees * (1 - part + 3.719 * math.sqrt(part)) ** 3


def chi_square(counts: torch.Tensor, expected: torch.Tensor | float) -> float:
    return float(((counts.double() - expected) ** 2 / expected).sum())


def test_bits_are_the_published_outputs_of_splitmix64():
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert unsigned(bits(torch.tensor([1234567]), torch.arange(1, 6))) == published


@pytest.mark.parametrize("count", [1, 7, 1000])
def test_bits_are_the_reference_algorithms_at_every_state_and_output(count):
    generator = torch.Generator().manual_seed(count)
    state, output = torch.randint(-(2**63), 2**63 - 1, (2, count), generator=generator)
    assert unsigned(bits(state, output)) == [splitmix64(s, o) for s, o in zip(state.tolist(), output.tolist(), strict=True)]


def test_draws_are_pinned_so_that_a_replay_on_another_version_draws_the_same():
    assert unsigned(draws([0, 1, 2**63 - 1], [0, 0, 12345])) == [
        12035550249420947055,
        6791897765849424158,
        3767006605639199971,
    ]
    scores = torch.arange(500).remainder(7).float()[None].expand(12, -1)
    assert race(scores, draws([5] * 12, list(range(12))), as_they_are(12)).tolist() == [
        335,
        201,
        271,
        81,
        62,
        90,
        118,
        39,
        152,
        125,
        118,
        432,
    ]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 2**31), st.lists(st.integers(0, 9_000), min_size=1, max_size=9))
def test_noise_follows_its_definition(seed, position, tokens):
    got = noise(draws([seed], [position]), max(tokens) + 1)[0, tokens]
    for value, token in zip(got.tolist(), tokens, strict=True):
        exact = reference_gumbel(seed, position, token)
        if exact > 0:
            assert value == pytest.approx(exact, abs=1e-5)
        # Of the distribution's function, whose slope is at most 1/e.
        assert math.exp(-math.exp(-value)) == pytest.approx(math.exp(-math.exp(-exact)), abs=4e-6)


def test_the_exponential_map_reaches_neither_zero_nor_infinity():
    least, nearly, most_of_all = _exponential(torch.tensor([0, 1 << 11, -1])).tolist()
    assert least == 2.0**-54
    assert nearly == 1.5 * 2.0**-53
    assert most_of_all == pytest.approx(24 * math.log(2))


def test_noise_is_exponential_over_its_whole_range_and_far_into_the_end_that_wins():
    count = 1 << 21
    values = noise(draws([3], [0]), count)[0].double().neg().exp()
    uniforms = 1 - values.neg().exp()
    assert chi_square(torch.histc(uniforms, bins=512, min=0, max=1), count / 512) < most(511)
    for power in (10, 14, 17):
        expected = count * 2.0**-power
        got = int((uniforms < 2.0**-power).sum())
        assert abs(got - expected) < 4.5 * math.sqrt(expected)


def test_neighbours_in_a_block_are_independent():
    values = noise(draws([4], [9]), 1 << 19)[0].neg().exp()
    pairs = (1 - values.neg().exp()).mul(16).long().clamp_(max=15).view(-1, 2)
    table = torch.bincount(pairs[:, 0] * 16 + pairs[:, 1], minlength=256)
    assert chi_square(table, len(pairs) / 256) < most(255)
    lanes = torch.bincount(values.view(-1, BLOCK).argmin(dim=1), minlength=BLOCK)
    assert chi_square(lanes, (1 << 19) / BLOCK**2) < most(BLOCK - 1)


@pytest.mark.parametrize("vary", ["seed", "position"])
def test_neighbouring_seeds_and_positions_are_independent(vary):
    count = 4000
    numbers, same = list(range(count)), [7] * count
    keys = draws(numbers, same) if vary == "seed" else draws(same, numbers)
    values = noise(keys, 300)[:, [0, 1, 290]].neg().exp()
    uniforms = (1 - values.neg().exp()).mul(8).long().clamp_(max=7)
    for column in uniforms.T:
        table = torch.bincount(column[:-1] * 8 + column[1:], minlength=64)
        assert chi_square(table, (count - 1) / 64) < most(63)
    crossed = torch.bincount(uniforms[:, 0] * 8 + uniforms[:, 1], minlength=64)
    assert chi_square(crossed, count / 64) < most(63)


def test_a_winner_follows_the_distribution_down_to_its_tail():
    """One seed, many positions; the rarest token is one in 3,000, and tokens lie in several blocks, the last one short."""
    count, vocab = 60_000, 150
    weights = torch.linspace(0, 3.5, vocab).roll(40)
    exact = weights.double().softmax(0) * count
    winners = [
        by_blocks(weights.expand(1000, -1), draws([11] * 1000, list(range(first, first + 1000))), as_they_are(1000))
        for first in range(0, count, 1000)
    ]
    got = torch.bincount(torch.cat(winners), minlength=vocab)
    assert chi_square(got, exact) < most(vocab - 1)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([1, 2, 63, 64, 65, 128, 1000, 5000]),
    st.sampled_from([0.0, 1.0, 6.0]),
    st.sampled_from([-math.inf, -3.0, 0.0]),
    st.integers(0, 2**31),
)
def test_a_race_by_blocks_has_the_winners_of_the_whole_race(rows, vocab, spread, floor, seed):
    scores = (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread).bfloat16().float()
    weigh = as_they_are(rows, floor)
    keys = draws([seed + row for row in range(rows)], list(range(rows)))
    whole = race(scores, keys, weigh)
    assert torch.equal(by_blocks(scores, keys, weigh), whole)
    possible = (scores >= floor).any(dim=1)
    every = weigh(scores) + noise(keys, vocab)
    assert torch.equal(whole[possible], every.argmax(dim=1)[possible])


def test_a_race_by_blocks_computes_the_noise_of_few_blocks(monkeypatch):
    import engine.sampling.gumbel as module

    seen: Counter[str] = Counter()
    real = module._noise

    def counted(keys: torch.Tensor, blocks: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen["tokens"] += blocks.numel() * BLOCK
        return real(keys, blocks, *rest)

    monkeypatch.setattr(module, "_noise", counted)
    scores = torch.randn(20, 128_256, generator=torch.Generator().manual_seed(0)) * 3
    by_blocks(scores, draws(list(range(20)), [0] * 20), as_they_are(20))
    assert seen["tokens"] < scores.numel() / 15


def test_the_last_block_whose_bound_is_above_the_best_so_far_is_raced_too():
    """Sixteen blocks promise more than they hold: their high score lies where their noise is least."""
    keys, blocks = draws([2], [6]), 17
    by_block = noise(keys, blocks * BLOCK).view(blocks, BLOCK)
    scores = torch.full((blocks, BLOCK), -math.inf)
    for block, own in enumerate(by_block[:-1]):
        scores[block, own.argmin()] = 10 - own.max()
    lane = by_block[-1].argmax()
    scores[-1, lane] = 9.9 - by_block[-1, lane]
    assert ((scores + by_block)[:-1].amax() < 9.5).item()
    assert by_blocks(scores.view(1, -1), keys, as_they_are(1)).tolist() == [16 * BLOCK + int(lane)]


def test_the_lower_id_wins_a_tie():
    vocab, first, second = 200, 30, 170
    keys = draws([1], [1])
    own = noise(keys, vocab)
    scores = torch.full((1, vocab), -math.inf)
    for token in (first, second):
        scores[0, token] = 100 - own[0, token]
    reached = scores + own
    assert reached[0, first] == reached[0, second]
    weigh = as_they_are(1)
    assert race(scores, keys, weigh).tolist() == by_blocks(scores, keys, weigh).tolist() == [first]
