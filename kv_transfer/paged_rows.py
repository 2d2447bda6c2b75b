"""Paged rows of bytes in host memory: gather and scatter of token ranges, with few and large copies.

Every numpy call here releases the GIL while it copies, and a call per *range* rather than per block keeps the number of
times that the GIL changes hands small; on a busy worker that costs more than the copies do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


# `(row offset, rows, first slot, None)` where slots are adjacent, else `(row offset, rows, 0, whole blocks)`.
Segment = tuple[int, int, int, npt.NDArray[np.intp] | None]


def segments(blocks: Sequence[int], block_size: int, start: int, count: int) -> list[Segment]:
    """Rows `[start, start + count)` of the sequence in `blocks`, cut so that each part is one copy."""
    if count == 0:
        return []
    size = block_size
    ids = np.asarray(blocks[start // size : -(-(start + count) // size)], dtype=np.intp)
    if len(ids) == 1 or bool((ids[1:] - ids[:-1] == 1).all()):
        return [(0, count, int(ids[0]) * size + start % size, None)]
    head = min(-start % size, count)
    tail = (count - head) % size
    parts: list[Segment] = []
    if head:
        parts.append((0, head, int(ids[0]) * size + start % size, None))
    whole = ids[1 if head else 0 : len(ids) - (1 if tail else 0)]
    if len(whole):
        parts.append((head, len(whole) * size, 0, whole))
    if tail:
        parts.append((count - tail, tail, int(ids[-1]) * size, None))
    return parts


class PagedRows:
    """`memory[num_blocks, block_size, row_bytes]`, one row a token. Shares the memory it is given."""

    def __init__(self, memory: Bytes) -> None:
        if memory.ndim != 3 or memory.dtype != np.uint8 or not memory.flags.c_contiguous:
            raise ValueError(f"Got {memory.shape = }, {memory.dtype = } but expected contiguous uint8 in three dimensions")
        self.num_blocks, self.block_size, self.row_bytes = memory.shape
        self._slots = memory.reshape(self.num_blocks * self.block_size, self.row_bytes)
        self._blocks = memory.reshape(self.num_blocks, self.block_size * self.row_bytes)

    def gather(self, parts: Sequence[Segment], out: Bytes) -> None:
        """Copy the rows of `parts` to `out[rows * row_bytes]`."""
        if self.row_bytes == 0:
            return
        for at, rows, slot, ids in parts:
            target = out[at * self.row_bytes : (at + rows) * self.row_bytes]
            if ids is None:
                target.reshape(rows, self.row_bytes)[:] = self._slots[slot : slot + rows]
            else:
                # Ids were checked; mode="clip" is what lets numpy write to `out` without a buffer between.
                np.take(self._blocks, ids, axis=0, out=target.reshape(len(ids), -1), mode="clip")

    def scatter(self, parts: Sequence[Segment], data: Bytes) -> None:
        """Copy `data[rows * row_bytes]` to the rows of `parts`."""
        if self.row_bytes == 0:
            return
        for at, rows, slot, ids in parts:
            source = data[at * self.row_bytes : (at + rows) * self.row_bytes]
            if ids is None:
                self._slots[slot : slot + rows] = source.reshape(rows, self.row_bytes)
            else:
                self._blocks[ids] = source.reshape(len(ids), -1)


def check_tokens(blocks: Sequence[int], num_blocks: int, block_size: int, start: int, count: int) -> None:
    """Raises ValueError unless tokens `[start, start + count)` lie in `blocks` and the blocks they lie in exist."""
    if start < 0 or count < 0 or start + count > len(blocks) * block_size:
        raise ValueError(f"Got tokens [{start}, {start + count}) but expected them within {len(blocks)} blocks of {block_size}")
    used = blocks[start // block_size : -(-(start + count) // block_size)]
    if count and not (min(used) >= 0 and max(used) < num_blocks):
        raise ValueError(f"Got blocks {min(used)} to {max(used)} but expected ids within [0, {num_blocks})")


class HostPages:
    """Every layer's key and value rows in host memory: the whole of a `KVStore` but its layout's meaning."""

    def __init__(self, layers: Sequence[tuple[Bytes, Bytes]]) -> None:
        self._layers = [(PagedRows(key), PagedRows(value)) for key, value in layers]

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        key, value, middle = self._checked(layer, blocks, start, count, out.nbytes)
        flat, parts = np.frombuffer(out, dtype=np.uint8), segments(blocks, key.block_size, start, count)
        key.gather(parts, flat[:middle])
        value.gather(parts, flat[middle:])

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        key, value, middle = self._checked(layer, blocks, start, count, data.nbytes)
        flat, parts = np.frombuffer(data, dtype=np.uint8), segments(blocks, key.block_size, start, count)
        key.scatter(parts, flat[:middle])
        value.scatter(parts, flat[middle:])

    def _checked(
        self, layer: int, blocks: Sequence[int], start: int, count: int, size_bytes: int
    ) -> tuple[PagedRows, PagedRows, int]:
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"Got {layer = } but expected one of {len(self._layers)}")
        key, value = self._layers[layer]
        check_tokens(blocks, key.num_blocks, key.block_size, start, count)
        expected = count * (key.row_bytes + value.row_bytes)
        if size_bytes != expected:
            raise ValueError(f"Got a buffer of {size_bytes} bytes but expected {expected}")
        return key, value, count * key.row_bytes
