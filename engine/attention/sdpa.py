"""Paged attention with plain torch operations: runs on any device, serves every option of `LayerSpec`.

It gathers each sequence's pages, those within the window where there is one, into one tensor and calls
`scaled_dot_product_attention`, or spells the softmax out where a soft cap or sinks take part. Slower than the kernels beside it,
and the reference that they are tested against.

Invariant: positions outside a sequence's context, and left of the window of its first new token, contribute exact zeros, even
where a page holds NaN from another owner.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from engine.attention.base import AttentionBatch, LayerCache, LayerSpec


class SdpaAttention:
    """The `AttentionBackend` of last resort, and the oracle."""

    name = "sdpa"

    @property
    def block_size_multiple(self) -> int:
        """Any block size will do."""
        return 1

    @property
    def capturable(self) -> bool:
        """No: it would gather the longest context that the model allows, for every sequence and layer."""
        return False

    def unsupported(self, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        """None, unless the heads do not divide into groups."""
        if spec.query_heads % spec.kv_heads:
            return f"{spec.query_heads} query heads do not divide into {spec.kv_heads} KV heads"
        return None

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
        if batch.max_query_len == 1:
            tables = batch.block_tables[:, : _pages(batch.max_context_len, cache)]
            return _attend(query[:, None], cache, tables, batch.context_lens.long(), spec, sinks)[:, 0]
        output = query.new_empty((query.shape[0], spec.query_heads, spec.value_dim))
        starts, contexts = batch.query_start.tolist(), batch.context_lens.tolist()
        singles = [i for i in range(len(contexts)) if starts[i + 1] - starts[i] == 1]
        if singles:
            chosen = torch.tensor(singles, device=query.device)
            rows = torch.tensor([starts[i] for i in singles], device=query.device)
            tables = batch.block_tables[chosen, : _pages(max(contexts[i] for i in singles), cache)]
            lens = batch.context_lens[chosen].long()
            output[rows] = _attend(query[rows][:, None], cache, tables, lens, spec, sinks)[:, 0]
        for i, context in enumerate(contexts):
            first, last = starts[i], starts[i + 1]
            if last - first > 1:
                tables = batch.block_tables[i : i + 1, : _pages(context, cache)]
                lens = batch.context_lens[i : i + 1].long()
                output[first:last] = _attend(query[None, first:last], cache, tables, lens, spec, sinks)[0]
        return output


def _pages(tokens: int, cache: LayerCache) -> int:
    return -(-tokens // cache.key.shape[1])


def _attend(
    query: torch.Tensor,
    cache: LayerCache,
    tables: torch.Tensor,
    context_lens: torch.Tensor,
    spec: LayerSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`query[S, Q, heads, key_dim]`, the last `Q` tokens of each of `S` contexts, to `[S, Q, heads, value_dim]`."""
    block_size, new, window = cache.key.shape[1], query.shape[1], spec.sliding_window
    first = torch.zeros_like(context_lens) if window is None else (context_lens - new - window + 1).clamp(min=0)
    if window is not None:
        count = min(tables.shape[1], _pages(window - 1 + new, cache) + 1)
        pages = first[:, None] // block_size + torch.arange(count, device=query.device)
        tables = tables.gather(1, pages.clamp(max=tables.shape[1] - 1))
    places = torch.arange(tables.shape[1] * block_size, device=query.device) + (first // block_size * block_size)[:, None]
    inside = (places < context_lens[:, None]) & (places >= first[:, None])
    key, value = (_gather(stored, tables, inside) for stored in (cache.key, cache.value))
    own = context_lens[:, None] - new + torch.arange(new, device=query.device)
    visible = places[:, None] <= own[..., None]
    if window is not None:
        visible &= places[:, None] > own[..., None] - window
    query = query.transpose(1, 2)
    if spec.softcap is None and not spec.has_sinks:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible[:, None], scale=spec.scale, enable_gqa=spec.query_heads != spec.kv_heads
        )
    else:
        out = _spelled_out(query, key, value, visible[:, None], spec, sinks)
    return out.transpose(1, 2)


def _gather(pages: torch.Tensor, tables: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """`[S, kv_heads, places, dim]`, zero outside the contexts."""
    found = pages[tables.long()].flatten(1, 2)
    return found.masked_fill(~inside[..., None, None], 0).transpose(1, 2)


def _spelled_out(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    spec: LayerSpec,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    groups = spec.query_heads // spec.kv_heads
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(-1, -2)).float() * spec.scale
    if spec.softcap is not None:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        column = sinks.float().view(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, column], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return weights.to(value.dtype) @ value
