"""A KV store of plain bytes: what simulated engines hold, and what tests look into. No torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from core.groups import LayerGroups, layer_groups
from core.layout import DTYPE_BYTES, KVLayout
from kv_transfer.paged_rows import Bytes, HostPages
from kv_transfer.store import Fence


class ByteStore:
    """`num_blocks` blocks of `layout`, zeroed. `pages[i]` is the pair of arrays of the i-th layer that the rank holds,
    `key[num_blocks, block_size, row_bytes]` and `value[...]` (uint8), open to the eye. Layers of different groups share them,
    as `LayerGroups.page_layers` says."""

    def __init__(self, layout: KVLayout, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"Got {num_blocks = } but expected at least 1")
        self._layout = layout
        self._first = layout.shard.layers.start
        self._groups = layer_groups(layout)
        shared: dict[int, tuple[Bytes, Bytes]] = {}
        for layers in self._groups.page_layers:
            shape = layout.layers[layers[0] - self._first]
            rows = [shape.kv_heads * dim * DTYPE_BYTES[layout.dtype] for dim in (shape.key_dim, shape.value_dim)]
            key, value = (np.zeros((num_blocks, layout.block_size, row), dtype=np.uint8) for row in rows)
            shared |= dict.fromkeys(layers, (key, value))
        self.pages: list[tuple[Bytes, Bytes]] = [shared[layer] for layer in sorted(shared)]
        self._host = HostPages(self.pages)

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def groups(self) -> LayerGroups:
        return self._groups

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        self._host.read(layer - self._first, blocks, start, count, out)

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        self._host.write(layer - self._first, blocks, start, count, data)

    def fence(self) -> Fence | None:
        return None
