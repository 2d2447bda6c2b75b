"""Tests that need a CUDA device; each is skipped, with the reason, where there is none."""

from __future__ import annotations

import random

import pytest

torch = pytest.importorskip("torch")


@pytest.fixture(scope="session")
def cuda():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device on this machine")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(5, 500) for _ in range(rng.randint(3, 90))] for _ in range(16)]
