"""The seam between a `transformers` decoder and the paged KV cache.

A decoder runs with its own modelling code; only its attention call is ours. Per layer and step the registered function
writes the new keys and values into the cache, then asks an `AttentionBackend` to attend over the pages.

Invariants shared by every backend:
- One layer's cache is a pair of tensors `key[num_blocks, block_size, kv_heads, key_dim]` and
  `value[num_blocks, block_size, kv_heads, value_dim]`; a *slot* is `block * block_size + offset`.
- A step packs its sequences raggedly: sequence `i` owns query rows `query_start[i]:query_start[i + 1]`, and they are the
  *last* tokens of its `context_lens[i]` tokens, all of which are in the cache when `attend` is called.
- Attention is causal. A window of `w` lets a token see itself and the `w - 1` tokens before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True)
class LayerSpec:
    """What one attention layer asks for, read off the model once, at load.

    Sizes are per rank. `sliding_window` is in tokens, None where the layer sees its whole context. `softcap` is Gemma 2's
    logit cap: `softcap * tanh(score / softcap)` before the softmax.
    """

    layer_index: int
    query_heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    sliding_window: int | None = None
    softcap: float | None = None
    has_sinks: bool = False


@dataclass(frozen=True)
class LayerCache:
    """One layer's pages: `key[num_blocks, block_size, kv_heads, key_dim]`, `value[..., value_dim]`."""

    key: torch.Tensor
    value: torch.Tensor


@dataclass(frozen=True)
class AttentionBatch:
    """One step's ragged batch of `S` sequences and `T` new tokens, on the device of the cache, for layers of one group.

    `query_start[S + 1]`, `context_lens[S]` and `block_tables[S, widest]` are int32; `slots[T]` is int64. Rows of
    `block_tables` are padded with 0 past a sequence's own blocks; a padded entry is never read. Left of what a layer's window
    lets the first new token see they may name blocks of other sequences: valid, but what is there counts for nothing.
    `max_query_len` and `max_context_len` are host integers so that no backend has to synchronise with the device.
    """

    query_start: torch.Tensor
    context_lens: torch.Tensor
    block_tables: torch.Tensor
    slots: torch.Tensor
    max_query_len: int
    max_context_len: int


class AttentionBackend(Protocol):
    """Attention over paged KV on one kind of device."""

    name: str

    @property
    def block_size_multiple(self) -> int:
        """Block sizes must be a multiple of this many tokens."""

    @property
    def capturable(self) -> bool:
        """Whether decode steps may be recorded once and replayed (`engine.cuda_graph`): for a batch of one token a sequence,
        `write` and `attend` only enqueue work on the device, their shapes follow from the batch's shapes and host integers
        alone, and they stay affordable when `block_tables` and `max_context_len` are the largest that the model allows."""

    def unsupported(self, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Say why this backend cannot serve the layer, or None if it can."""

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        """Store `key[T, kv_heads, key_dim]` and `value[T, kv_heads, value_dim]` into `slots[T]`."""

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        spec: LayerSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `[T, query_heads, value_dim]` for `query[T, query_heads, key_dim]`.

        `sinks[query_heads]` are gpt-oss's learned logits that take part in the softmax's denominator only.
        """
