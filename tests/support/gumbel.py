"""The definition of keyed Gumbel noise, one token at a time, on Python's integers and floats."""

from __future__ import annotations

import math

BLOCK = 64
MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def splitmix64(state: int, output: int) -> int:
    """The reference algorithm, on Python's integers."""
    z = (state + output * GOLDEN) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def exponential(word: int) -> float:
    return -math.log1p(-min(((word >> 11) + 0.5) * 2.0**-53, 1 - 2.0**-24))


def reference_gumbel(seed: int, position: int, token: int) -> float:
    """The definition, one token at a time."""
    state = splitmix64(splitmix64(seed, 1), position + 1)
    block = splitmix64(state, -1 - token // BLOCK)
    value = exponential(block) / BLOCK
    if token % BLOCK != block % BLOCK:
        value += exponential(splitmix64(state, token + 1))
    return -math.log(value)
