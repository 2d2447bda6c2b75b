"""Paged attention with torch's own flash kernel (`torch.nn.attention.varlen`), on CUDA.

`num_splits=1` turns split-KV off, so that a sequence's result is the same bits whatever else is in the batch.
Sinks are applied afterwards from the log-sum-exp: a sink only adds `exp(sink)` to the softmax's denominator.
"""

from __future__ import annotations

import inspect

import torch

from engine.attention.base import AttentionBatch, LayerCache, LayerSpec

_NEEDED = {"scale", "window_size", "enable_gqa", "seqused_k", "block_table", "num_splits", "return_aux"}


class VarlenAttention:
    """The `AttentionBackend` that needs nothing but a recent torch on an NVIDIA GPU (compute capability 8.0 or more)."""

    name = "varlen"

    @property
    def block_size_multiple(self) -> int:
        """The kernel reads whole pages of 256 tokens."""
        return 256

    @property
    def capturable(self) -> bool:
        """Yes: one kernel, which reads lengths and tables on the device."""
        return True

    def unsupported(self, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """Say why the kernel cannot serve the layer: device, dtype, head sizes, soft cap, or a torch that lacks it."""
        refusal = refuse_flash(spec, dtype, device)
        if refusal is not None:
            return refusal
        if spec.softcap is not None:
            return "torch's varlen_attn has no soft cap"
        try:
            from torch.nn.attention.varlen import varlen_attn
        except ImportError:
            return f"torch {torch.__version__} has no torch.nn.attention.varlen"
        missing = _NEEDED - set(inspect.signature(varlen_attn).parameters)
        return f"varlen_attn of torch {torch.__version__} does not take {sorted(missing)}" if missing else None

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
        from torch.nn.attention.varlen import AuxRequest, varlen_attn

        left = -1 if spec.sliding_window is None else spec.sliding_window - 1
        result = varlen_attn(
            query,
            cache.key,
            cache.value,
            batch.query_start,
            None,
            batch.max_query_len,
            batch.max_context_len,
            return_aux=AuxRequest(lse=sinks is not None),
            scale=spec.scale,
            window_size=(left, 0),
            enable_gqa=spec.query_heads != spec.kv_heads,
            seqused_k=batch.context_lens,
            block_table=batch.block_tables,
            num_splits=1,
        )
        if sinks is None:
            return result if isinstance(result, torch.Tensor) else result[0]
        out, lse = result
        return apply_sinks(out, _by_token(lse, out.shape[0]), sinks)


def refuse_flash(spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> str | None:
    """What every flash kernel refuses."""
    if device.type != "cuda":
        return f"flash kernels run on CUDA, not on {device}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"flash kernels take float16 or bfloat16, not {dtype}"
    if spec.key_dim != spec.value_dim:
        return f"flash kernels need keys as wide as values, not {spec.key_dim} and {spec.value_dim}"
    if spec.key_dim > 256 or spec.key_dim % 8:
        return f"flash kernels need head sizes that are multiples of 8 up to 256, not {spec.key_dim}"
    if spec.query_heads % spec.kv_heads:
        return f"{spec.query_heads} query heads do not divide into {spec.kv_heads} KV heads"
    return None


def apply_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Rescale `out[T, heads, dim]` as if `sinks[heads]` had taken part in the softmax whose log-sum-exp is `lse[T, heads]`."""
    share = torch.sigmoid(lse.float() - sinks.float()[None])
    return (out.float() * share[..., None]).to(out.dtype)


def _by_token(lse: torch.Tensor, tokens: int) -> torch.Tensor:
    """`[T, heads]`, whichever of the two orders this torch answers in."""
    return lse if lse.shape[0] == tokens and lse.shape[1] != tokens else lse.transpose(0, 1)
