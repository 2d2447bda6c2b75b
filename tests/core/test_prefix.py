"""Equal block hashes mean equal prefixes of the same tenant."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from core.prefix import block_hash, block_hashes, root_hash

TOKENS = st.lists(st.integers(0, 5), max_size=40)


@given(TOKENS, TOKENS, st.integers(1, 8))
def test_hashes_agree_exactly_as_far_as_the_full_blocks_do(one: list[int], other: list[int], size: int) -> None:
    hashes = zip(block_hashes(one, size, b""), block_hashes(other, size, b""), strict=False)
    for index, (left, right) in enumerate(hashes):
        end = (index + 1) * size
        assert (left == right) == (one[:end] == other[:end])


@given(TOKENS, st.integers(1, 8))
def test_hashing_block_by_block_gives_the_same(tokens: list[int], size: int) -> None:
    parent = root_hash(b"salt")
    for index, expected in enumerate(block_hashes(tokens, size, b"salt")):
        parent = block_hash(parent, tokens[index * size : (index + 1) * size])
        assert parent == expected


def test_tenants_do_not_share() -> None:
    assert set(block_hashes([1, 2, 3, 4], 2, b"a")).isdisjoint(block_hashes([1, 2, 3, 4], 2, b"b"))
