"""The attention function that a `transformers` model calls while it serves.

`register()` makes it known under `NAME`; a step's context reaches it as the keyword argument `paged` of `model(...)`,
which every supported model hands down to its attention untouched. Unregistered as a mask name, it gets no mask: causality,
windows and raggedness are the backend's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface

from engine.attention.base import AttentionBackend, AttentionBatch, LayerCache, LayerSpec
from engine.plan import LayerListener

NAME = "hetserve"


@dataclass(frozen=True)
class StepContext:
    """All that one step's attention calls share. `specs`, `caches` and `groups`, which of the batches is the layer's, are
    indexed by layer."""

    backend: AttentionBackend
    specs: Sequence[LayerSpec]
    caches: Sequence[LayerCache]
    groups: Sequence[int]
    batches: Sequence[AttentionBatch]
    on_layer: LayerListener | None = None


def register() -> None:
    """Make `NAME` an attention implementation that models can be set to. Idempotent."""
    AttentionInterface.register(NAME, paged_attention)


def paged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged: StepContext,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Write one layer's new KV, tell the listener, attend.

    Args:
        query: `[1, query_heads, T, key_dim]`, all sequences of the step packed; `key` and `value` likewise.

    Returns:
        `[1, T, query_heads, value_dim]`, and None for the weights.
    """
    index = module.layer_idx
    assert isinstance(index, int)
    cache, spec, batch = paged.caches[index], paged.specs[index], paged.batches[paged.groups[index]]
    dtype = cache.key.dtype
    rows = [tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value)]
    paged.backend.write(rows[1], rows[2], cache, batch.slots)
    if paged.on_layer is not None:
        paged.on_layer(index)
    out = paged.backend.attend(rows[0], cache, batch, spec, s_aux if spec.has_sinks else None)
    return out[None].to(query.dtype), None
