"""A KV store of plain bytes: what simulated engines hold, and what tests look into. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.layout import DTYPE_BYTES, KVLayout
from kv_transfer.paged_rows import Bytes, HostPages
from kv_transfer.store import Fence


class ByteStore:
    """`num_blocks` blocks of `layout`, zeroed. `pages[i]` is the pair of arrays of the i-th layer that the rank holds,
    `key[num_blocks, block_size, row_bytes]` and `value[...]` (uint8), open to the eye."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"Got {num_blocks = } but expected at least 1")
        self._layout = layout
        self._first = layout.shard.layers.start
        width = DTYPE_BYTES[layout.dtype]
        self.pages: list[tuple[Bytes, Bytes]] = [
            (
                np.zeros((num_blocks, layout.block_size, shape.kv_heads * shape.key_dim * width), dtype=np.uint8),
                np.zeros((num_blocks, layout.block_size, shape.kv_heads * shape.value_dim * width), dtype=np.uint8),
            )
            for shape in layout.layers
        ]
        self._host = HostPages(self.pages)

    @property
    def layout(self) -> KVLayout:
        return self._layout

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        self._host.read(layer - self._first, blocks, start, count, out)

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        self._host.write(layer - self._first, blocks, start, count, data)

    def fence(self) -> Fence | None:
        return None
