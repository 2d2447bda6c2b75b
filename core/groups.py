"""Which layers of a cache keep the same tokens, and so share one block table.

A layer with a sliding window needs no more than the tokens that its window still sees. So the layers of a cache are put in
*groups*: those of a group have one window, and each group of a sequence has a block table of its own, whose blocks are given back
as the window leaves them.

All groups draw their blocks from one pool. That works because groups are of equal size: page tensor `i` holds the `i`-th layer of
every group, and a block is one page in each of the tensors, used by the one group that owns it. So a kind of layer that is more
frequent than another is cut into several groups. This is vLLM's hybrid KV cache manager's idea.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from core.layout import KVLayout, LayerShape, first_seen

NO_BLOCK = -1
"""Stands in a block table where the window has left what was there."""

Tables = Sequence[Sequence[int]]
"""The block tables of one sequence, one per group: block ids in order of position, `NO_BLOCK` where none is kept."""


@dataclass(frozen=True)
class LayerGroup:
    """Layers, as the model numbers them, that share a block table, and the window they have in common (None: they see all)."""

    layers: tuple[int, ...]
    sliding_window: int | None = None

    def first_seen(self, position: int) -> int:
        """The first token that the token at `position` sees in these layers."""
        return first_seen(self.sliding_window, position)


@dataclass(frozen=True)
class LayerGroups:
    """All groups of a rank's cache. `page_layers[i]` are the layers whose pages are tensor `i`, at most one of each group."""

    groups: tuple[LayerGroup, ...]

    @property
    def windowed(self) -> bool:
        """Whether some layers keep less than all tokens."""
        return any(group.sliding_window is not None for group in self.groups)

    @property
    def page_layers(self) -> tuple[tuple[int, ...], ...]:
        most = max(len(group.layers) for group in self.groups)
        return tuple(tuple(group.layers[at] for group in self.groups if at < len(group.layers)) for at in range(most))

    @cached_property
    def _group_of(self) -> dict[int, int]:
        return {layer: index for index, group in enumerate(self.groups) for layer in group.layers}

    def group_of(self, layer: int) -> int:
        """The index of the group that a layer of the model belongs to."""
        return self._group_of[layer]


def block_bytes(layout: KVLayout, groups: LayerGroups) -> int:
    """Of one block: a page in each page tensor."""
    return layout.block_size * sum(layout.layer_bytes_per_token(layers[0]) for layers in groups.page_layers)


def layer_groups(layout: KVLayout) -> LayerGroups:
    """The groups of what a rank holds.

    Layers of unlike shapes cannot share page tensors: then there is one group, which keeps everything, as for a model without
    windows. Of the ways to cut, the one that leaves the fewest pages unused is taken, then the one with the fewest groups.
    """
    numbers = range(layout.shard.layers.start, layout.shard.layers.stop)
    kinds: dict[int | None, list[int]] = {}
    for number, shape in zip(numbers, layout.layers, strict=True):
        kinds.setdefault(shape.sliding_window, []).append(number)
    if len({_size(shape) for shape in layout.layers}) > 1:
        return LayerGroups((LayerGroup(tuple(numbers)),))
    sizes = sorted({len(layers) for layers in kinds.values()}, reverse=True)
    size = min(sizes, key=lambda size: sum(-(-len(layers) // size) * size for layers in kinds.values()))
    return LayerGroups(
        tuple(
            LayerGroup(tuple(part), window) for window, layers in kinds.items() for part in _cut(layers, -(-len(layers) // size))
        )
    )


def _size(shape: LayerShape) -> tuple[int, int, int]:
    return shape.kv_heads, shape.key_dim, shape.value_dim


def _cut(layers: list[int], parts: int) -> list[list[int]]:
    """`layers` in order, in `parts` parts whose sizes differ by one at most, the larger ones first."""
    least, more = divmod(len(layers), parts)
    ends = [(at + 1) * least + min(at + 1, more) for at in range(parts)]
    return [layers[start:end] for start, end in zip([0, *ends], ends, strict=False)]
