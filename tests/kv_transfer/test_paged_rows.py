"""Paged rows against a walk slot by slot."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.groups import NO_BLOCK
from kv_transfer.paged_rows import HostPages, PagedRows, check_tokens, segments


@st.composite
def ranges(draw: st.DrawFn) -> tuple[int, int, list[int], int, int]:
    size, row_bytes = draw(st.integers(1, 5)), draw(st.integers(1, 7))
    blocks = draw(st.lists(st.integers(0, 9), min_size=1, max_size=10, unique=True))
    if draw(st.booleans()):
        blocks = sorted(blocks)
    start = draw(st.integers(0, len(blocks) * size))
    return size, row_bytes, blocks, start, draw(st.integers(0, len(blocks) * size - start))


@given(ranges(), st.integers(0, 2**32))
def test_gather_and_scatter_move_exactly_the_rows_named(case: tuple[int, int, list[int], int, int], seed: int) -> None:
    size, row_bytes, blocks, start, count = case
    memory = np.random.default_rng(seed).integers(0, 256, (10, size, row_bytes), dtype=np.uint8)
    slots = [(blocks[token // size], token % size) for token in range(start, start + count)]
    out = np.zeros(count * row_bytes, dtype=np.uint8)
    parts = segments(blocks, size, start, count)
    PagedRows(memory).gather(parts, out)
    assert out.tobytes() == b"".join(memory[slot].tobytes() for slot in slots)

    target = np.full_like(memory, 7)
    expected = target.copy()
    for slot in slots:
        expected[slot] = memory[slot]
    PagedRows(target).scatter(parts, out)
    assert (target == expected).all()


@pytest.mark.parametrize(
    ("blocks", "start", "count"),
    [([0, 1], 0, 9), ([0, 1], -1, 2), ([0, 10], 4, 1), ([3, NO_BLOCK], 0, 5), ([0], 2, -1), ([], 0, 1)],
)
def test_tokens_outside_the_blocks_or_the_memory_are_refused(blocks: list[int], start: int, count: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        check_tokens(blocks, 10, 4, start, count)


def test_what_a_window_has_left_is_neither_read_nor_written() -> None:
    memory = np.full((4, 4, 3), 7, np.uint8)
    pages, table = HostPages([(memory, memory.copy())]), [NO_BLOCK, 2]
    for start, count in ((0, 8), (3, 2), (0, 1)):
        with pytest.raises(ValueError, match="-1"):
            pages.read(0, table, start, count, memoryview(bytearray(count * 6)))
        with pytest.raises(ValueError, match="-1"):
            pages.write(0, table, start, count, memoryview(bytes(count * 6)))
    assert (memory == 7).all()
    pages.write(0, table, 4, 4, memoryview(bytes(24)))
    assert (memory[2] == 0).all()


def test_a_layer_that_does_not_exist_or_a_buffer_of_another_size_is_refused() -> None:
    pages = HostPages([(np.zeros((2, 4, 3), np.uint8), np.zeros((2, 4, 2), np.uint8))])
    for layer in (-1, 1):
        with pytest.raises(ValueError, match="layer"):
            pages.read(layer, [0], 0, 1, memoryview(bytearray(5)))
    with pytest.raises(ValueError, match="expected 10"):
        pages.write(0, [0], 0, 2, memoryview(bytes(9)))


def test_a_layer_without_values_moves_only_keys() -> None:
    key = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    pages = HostPages([(key, np.zeros((2, 4, 0), np.uint8))])
    out = bytearray(6)
    pages.read(0, [1, 0], 3, 2, memoryview(out))
    assert bytes(out) == key[1, 3].tobytes() + key[0, 0].tobytes()
