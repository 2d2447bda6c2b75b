"""Paged attention with the flash-attn package (Dao et al.), on CUDA. An optional extra: imported when first asked for."""

from __future__ import annotations

import importlib.util

import torch

from engine.attention.base import AttentionBatch, LayerCache, LayerSpec
from engine.attention.varlen import apply_sinks, refuse_flash


class FlashAttention:
    """The `AttentionBackend` over `flash_attn_varlen_func`: soft caps, windows, and sinks by way of the log-sum-exp."""

    name = "flash"

    @property
    def block_size_multiple(self) -> int:
        """flash-attn 2 reads whole pages of 256 tokens."""
        return 256

    @property
    def capturable(self) -> bool:
        """Yes: one kernel, which reads lengths and tables on the device."""
        return True

    def unsupported(self, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Say why the kernel cannot serve the layer: not installed, device, dtype or head sizes."""
        if importlib.util.find_spec("flash_attn") is None:
            return "flash-attn is not installed (pip install 'hetserve[flash]')"
        return refuse_flash(spec, dtype, device)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, slots: torch.Tensor) -> None:
        """Store `key[T, kv_heads, key_dim]` and `value[T, kv_heads, value_dim]` into `slots[T]`."""
        cache.key.flatten(0, 1).index_copy_(0, slots, key)
        cache.value.flatten(0, 1).index_copy_(0, slots, value)

    def attend(
        self,
        query: torch.Tensor,
        cache: LayerCache,
        batch: AttentionBatch,
        spec: LayerSpec,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return `[T, query_heads, value_dim]` for `query[T, query_heads, key_dim]`."""
        from flash_attn import flash_attn_varlen_func

        left = -1 if spec.sliding_window is None else spec.sliding_window - 1
        context_start = torch.nn.functional.pad(batch.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        result = flash_attn_varlen_func(
            query,
            cache.key,
            cache.value,
            cu_seqlens_q=batch.query_start,
            cu_seqlens_k=context_start,
            max_seqlen_q=batch.max_query_len,
            max_seqlen_k=batch.max_context_len,
            softmax_scale=spec.scale,
            causal=True,
            window_size=(left, 0),
            softcap=spec.softcap or 0.0,
            block_table=batch.block_tables,
            return_attn_probs=sinks is not None,
        )
        out: torch.Tensor = result if sinks is None else result[0]
        return out if sinks is None else apply_sinks(out, result[1].transpose(0, 1), sinks)
