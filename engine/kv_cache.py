"""The KV cache as tensors: how many blocks fit, and the pairs of page tensors, each for one layer of every group.

Pages start as zeros: kernels multiply masked values by zero, and a NaN left over in fresh memory would survive that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from core.config import EngineConfig
from core.errors import ConfigError
from core.groups import LayerGroups, block_bytes, layer_groups
from core.layout import KVLayout, LayerShape
from engine.attention.base import LayerCache, LayerSpec
from engine.windows import Windows

_CPU_SHARE = 0.25
_CPU_MOST_BYTES = 2 << 30
_STEPS_AHEAD = 1  # at most
_USEFUL_FACTOR = 2  # as much again as the running sequences can fill, for prefixes worth keeping


@dataclass(frozen=True)
class KVCache:
    """`layers[i]` holds the pages of attention layer `i`; `layout` describes one token's share of all of them. Layers of
    different `groups` may share their pages, since a block is used by one group at a time.

    `layers_with_scratch`, where it was asked for, are the same pages and one block more at the end, numbered `num_blocks`: no
    sequence ever owns it, so padding may write there.
    """

    layers: tuple[LayerCache, ...]
    layout: KVLayout
    groups: LayerGroups
    num_blocks: int
    layers_with_scratch: tuple[LayerCache, ...] | None = None


def layout_of(specs: Sequence[LayerSpec], dtype: torch.dtype, block_size: int) -> KVLayout:
    """What a token's KV looks like for these layers."""
    shapes = tuple(LayerShape(spec.kv_heads, spec.key_dim, spec.value_dim, spec.sliding_window) for spec in specs)
    return KVLayout.whole(layers=shapes, dtype=str(dtype).removeprefix("torch."), block_size=block_size)


def allocate(layout: KVLayout, num_blocks: int, device: torch.device, *, scratch: bool = False) -> KVCache:
    """Zeroed pages for `num_blocks` blocks, and with `scratch` for one more. Raises ConfigError if the device does not have
    the memory."""
    dtype, groups = getattr(torch, layout.dtype), layer_groups(layout)
    pages, first = num_blocks + scratch, layout.shard.layers.start
    by_layer: dict[int, LayerCache] = {}
    try:
        for shared in groups.page_layers:
            shape = layout.layers[shared[0] - first]
            sizes = [(pages, layout.block_size, shape.kv_heads, dim) for dim in (shape.key_dim, shape.value_dim)]
            cache = LayerCache(*(torch.zeros(size, dtype=dtype, device=device) for size in sizes))
            by_layer.update(dict.fromkeys(shared, cache))
    except (torch.OutOfMemoryError, RuntimeError) as error:
        size = pages * block_bytes(layout, groups)
        raise ConfigError(f"cannot allocate a KV cache of {size} bytes on {device}: {error}", "engine.kv_bytes") from error
    layers = tuple(by_layer[layer] for layer in sorted(by_layer))
    if not scratch:
        return KVCache(layers, layout, groups, num_blocks)
    owned = tuple(LayerCache(layer.key[:num_blocks], layer.value[:num_blocks]) for layer in layers)
    return KVCache(owned, layout, groups, num_blocks, layers)


def affordable_blocks(
    layout: KVLayout, config: EngineConfig, device: torch.device, max_model_len: int, activation_bytes: int = 0
) -> int:
    """How many blocks to allocate.

    `config.kv_bytes` decides where it is set. Otherwise it is the share `memory_utilization` of the device memory that is
    free with the weights loaded, less `activation_bytes` for a step; on CPU a quarter of that share of the memory that is
    available, at most 2 GiB, since a machine has other tenants. Never more than twice what `max_num_seqs` sequences of
    `max_model_len` tokens could fill.

    Raises:
        ConfigError: not even one block fits.
    """
    if config.kv_bytes is not None:
        size = config.kv_bytes
    elif device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        size = int((free - activation_bytes) * config.memory_utilization)
    else:
        size = min(int(psutil.virtual_memory().available * config.memory_utilization * _CPU_SHARE), _CPU_MOST_BYTES)
    groups = layer_groups(layout)
    blocks = size // block_bytes(layout, groups)
    if config.kv_bytes is None:
        windows = Windows(groups, layout.block_size, blocks, config.max_num_batched_tokens, _STEPS_AHEAD)
        longest = windows.needed(max_model_len, config.max_num_batched_tokens)
        blocks = min(blocks, _USEFUL_FACTOR * config.max_num_seqs * longest)
    if blocks < 1:
        needed = block_bytes(layout, groups)
        raise ConfigError(f"a KV cache of {size} bytes has no room for a block of {needed}", "engine.kv_bytes")
    return blocks
