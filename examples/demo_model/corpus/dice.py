"""Choices that are the same in every process and every Python.

Only `random.Random.random` is promised to stay what it is across versions, so everything here is made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from random import Random
from typing import TypeVar

Item = TypeVar("Item")


class Dice:
    def __init__(self, *seed: int | str) -> None:
        digest = blake2b("\0".join(map(str, seed)).encode(), digest_size=16).digest()
        self._random = Random(int.from_bytes(digest, "big")).random

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        return int(self._random() * bound)

    def between(self, least: int, most: int) -> int:
        """A number from `least` to `most`, both included."""
        return least + int(self._random() * (most - least + 1))

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self._random() * len(items))]

    def weighted(self, items: Sequence[Item], weights: Sequence[float]) -> Item:
        left = self._random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def sample(self, items: Sequence[Item], count: int, *, shuffle: float = 1.0) -> list[Item]:
        """`count` different ones, in random order; with less `shuffle`, early items come earlier and more often."""
        spread = shuffle * len(items)
        order = sorted((index * (1 - shuffle) + self._random() * spread, index) for index in range(len(items)))
        return [items[index] for _, index in order[:count]]
