"""Causal attention for training on a CPU, as a `transformers` attention function.

torch's CPU kernel for it takes about half of a training step of models this small. Here scores are plain matrix products in
bfloat16 (or float32, where training runs in it), a block of queries at a time, against only the keys that the block may
see; query heads that share a KV head are multiplied together, so keys and values are never repeated. Memory is
`queries x keys` per head, so it is meant for blocks of a few hundred to a thousand tokens.

Every row of a batch is attended to from its beginning: no padding, no mask from outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

NAME = "demo_training"
QUERIES = 128
"""In a block. Larger ones multiply more scores that the mask then hides; smaller ones make small products."""


def register() -> str:
    """Make it known to `transformers`; returns the name to ask for it by."""
    AttentionInterface.register(NAME, causal_attention)
    return NAME


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """`[batch, heads, tokens, size]` queries and `[batch, kv heads, tokens, size]` keys and values to
    `[batch, tokens, heads, size]`. `attention_mask` is not looked at."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    with torch.autocast("cpu", enabled=False):  # it would have softmax write float32
        out = _attend(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key, value)
    return out.transpose(1, 2).contiguous(), None


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    rows, heads, tokens, size = query.shape
    kv_heads = key.shape[1]
    shared = heads // kv_heads
    grouped = query.view(rows, kv_heads, shared, tokens, size)
    keys = key.transpose(2, 3)
    out = []
    for begin in range(0, tokens, QUERIES):
        end = min(begin + QUERIES, tokens)
        count = end - begin
        scores = grouped[:, :, :, begin:end].reshape(rows, kv_heads, shared * count, size) @ keys[..., :end]
        hidden = torch.full((count, end), float("-inf"), dtype=scores.dtype).triu(begin + 1)
        weights = torch.softmax(scores.view(rows, kv_heads, shared, count, end) + hidden, dim=-1)
        mixed = weights.view(rows, kv_heads, shared * count, end) @ value[:, :, :end]
        out.append(mixed.view(rows, kv_heads, shared, count, size))
    return torch.cat(out, dim=3).view(rows, heads, tokens, size)
