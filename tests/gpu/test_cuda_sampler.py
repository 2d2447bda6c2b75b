"""The sampler on a real device: the CPU's bits and tokens, and no wait before a draw is read."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from core.sampling import SamplingParams
from engine.sampling.gumbel import bits
from engine.sampling.sampler import Sampler

pytestmark = pytest.mark.gpu
VOCAB = 32_000
MIXED = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 50},
    {"top_k": 2000, "top_p": 0.8, "min_p": 0.001},
    {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": 0.5},
    {"logit_bias": {3: 9.0, 8: -100.0}, "min_tokens": 4, "logprobs": 3},
    {"min_p": 0.1, "frequency_penalty": -0.5, "repetition_penalty": 0.8, "logprobs": 0},
]


@pytest.fixture
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def sampler_of(device: torch.device) -> Sampler:
    sampler = Sampler(VOCAB, frozenset([2]), device)
    for row, options in enumerate(MIXED):
        sampler.admit(row, [5, 6, 7, 1, 2], 3, SamplingParams(max_tokens=100, seed=row, **options))
    return sampler


def logits_of(device: torch.device) -> torch.Tensor:
    return (torch.randn(len(MIXED), VOCAB, generator=torch.Generator().manual_seed(0)) * 3).to(device)


def test_bits_are_those_of_a_cpu(cuda):
    state, output = torch.randint(-(2**63), 2**63 - 1, (2, 10_000))
    assert torch.equal(bits(state.to(cuda), output.to(cuda)).cpu(), bits(state, output))


def test_draws_are_those_of_a_cpu(cuda):
    here, there = sampler_of(torch.device("cpu")), sampler_of(cuda)
    for position in range(2, 12):
        expected, faults = here.draw(logits_of(torch.device("cpu")), range(len(MIXED)), [position] * len(MIXED)).read()
        drawn, none = there.draw(logits_of(cuda), range(len(MIXED)), [position] * len(MIXED)).read()
        assert faults == none == {}
        assert [one.token for one in drawn] == [one.token for one in expected]


def test_admitting_and_drawing_wait_for_nothing(cuda, no_waiting):
    logits, sampler = logits_of(cuda), sampler_of(cuda)
    steps = [sampler.draw(logits, range(len(MIXED)), [position] * len(MIXED)) for position in range(2, 6)]
    torch.cuda.set_sync_debug_mode("default")
    assert all(one.token >= 0 for step in steps for one in step.read()[0])
    assert all(step.ready for step in steps)
