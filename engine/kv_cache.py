"""The KV cache as tensors: how many blocks fit, and one pair of page tensors per layer.

Pages start as zeros: kernels multiply masked values by zero, and a NaN left over in fresh memory would survive that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import psutil
import torch

from core.config import EngineConfig
from core.errors import ConfigError
from core.layout import KVLayout, LayerShape
from engine.attention.base import LayerCache, LayerSpec

_CPU_SHARE = 0.25
_CPU_MOST_BYTES = 2 << 30
_USEFUL_FACTOR = 2  # as much again as the running sequences can fill, for prefixes worth keeping


@dataclass(frozen=True)
class KVCache:
    """`layers[i]` holds the pages of attention layer `i`; `layout` describes one token's share of all of them.

    `layers_with_scratch`, where it was asked for, are the same pages and one block more at the end, numbered `num_blocks`: no
    sequence ever owns it, so padding may write there.
    """

    layers: tuple[LayerCache, ...]
    layout: KVLayout
    num_blocks: int
    layers_with_scratch: tuple[LayerCache, ...] | None = None


def layout_of(specs: Sequence[LayerSpec], dtype: torch.dtype, block_size: int) -> KVLayout:
    """What a token's KV looks like for these layers."""
    shapes = tuple(LayerShape(spec.kv_heads, spec.key_dim, spec.value_dim, spec.sliding_window) for spec in specs)
    return KVLayout.whole(layers=shapes, dtype=str(dtype).removeprefix("torch."), block_size=block_size)


def allocate(layout: KVLayout, num_blocks: int, device: torch.device, *, scratch: bool = False) -> KVCache:
    """Zeroed pages for `num_blocks` blocks, and with `scratch` for one more. Raises ConfigError if the device does not have
    the memory."""
    dtype = getattr(torch, layout.dtype)
    pages = num_blocks + scratch
    try:
        layers = tuple(
            LayerCache(*(torch.zeros(pages, layout.block_size, s.kv_heads, dim, dtype=dtype, device=device) for dim in dims))
            for s in layout.layers
            for dims in [(s.key_dim, s.value_dim)]
        )
    except (torch.OutOfMemoryError, RuntimeError) as error:
        size = pages * layout.bytes_per_block
        raise ConfigError(f"cannot allocate a KV cache of {size} bytes on {device}: {error}", "engine.kv_bytes") from error
    if not scratch:
        return KVCache(layers, layout, num_blocks)
    owned = tuple(LayerCache(layer.key[:num_blocks], layer.value[:num_blocks]) for layer in layers)
    return KVCache(owned, layout, num_blocks, layers)


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
    blocks = size // layout.bytes_per_block
    if config.kv_bytes is None:
        blocks = min(blocks, _USEFUL_FACTOR * config.max_num_seqs * layout.blocks_for(max_model_len))
    if blocks < 1:
        raise ConfigError(f"a KV cache of {size} bytes has no room for a block of {layout.bytes_per_block}", "engine.kv_bytes")
    return blocks
