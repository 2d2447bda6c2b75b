"""The seam between a transfer and the memory that holds KV.

The wire speaks in ranges of layers, heads and tokens, never in blocks or addresses: a peer can neither name memory nor depend
on the other's block size. A store turns `(layer, blocks, start, count)` into bytes and back, with all heads that it holds;
`blocks` is the table of the layer's group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from core.groups import LayerGroups, Tables
from core.layout import KVLayout, Region


class Fence(Protocol):
    """A point in the order of an engine's writes."""

    def passed(self) -> bool:
        """Whether every write before the point is visible to `read`. Never blocks; asked often until it is true."""


class KVStore(Protocol):
    """One engine's KV cache. `read` and `write` may be called from several threads at once, for disjoint tokens.

    `layer` is numbered as in the model. A piece of `count` tokens of it is `count` key rows, then `count` value rows, each row
    `heads * dim` elements for the heads that this rank holds, with nothing between them: in all
    `count * layout.layer_bytes_per_token(layer)` bytes.
    """

    @property
    def layout(self) -> KVLayout: ...

    @property
    def groups(self) -> LayerGroups:
        """Which layers share a block table."""

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        """Gather tokens `[start, start + count)` of the sequence that lives in `blocks` into `out`, which they fill exactly.

        Raises:
            ValueError: the tokens do not lie in `blocks`, a block is `NO_BLOCK` or does not exist, or `out` has another size.
        """

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        """Scatter `data`, which may be read-only, into those tokens; nothing else changes. Visible to the engine on return.
        Raises as `read`."""

    def fence(self) -> Fence | None:
        """Called by the thread that writes: a fence after all it has written so far, or None if that is visible already."""


def read_region(store: KVStore, tables: Tables, region: Region, out: memoryview) -> None:
    """Gather a region, layer after layer; `out` is all its bytes. Raises as `KVStore.read`."""
    for layer, part in _parts(store, region, out):
        store.read(layer, tables[store.groups.group_of(layer)], region.tokens.start, region.tokens.size, part)


def write_region(store: KVStore, tables: Tables, region: Region, data: memoryview) -> None:
    """Scatter what `read_region` has gathered. Raises as `KVStore.write`."""
    for layer, part in _parts(store, region, data):
        store.write(layer, tables[store.groups.group_of(layer)], region.tokens.start, region.tokens.size, part)


def _parts(store: KVStore, region: Region, whole: memoryview) -> Iterator[tuple[int, memoryview]]:
    at = 0
    for layer in range(region.layers.start, region.layers.stop):
        size = region.tokens.size * store.layout.layer_bytes_per_token(layer)
        yield layer, whole[at : at + size]
        at += size
