"""Latency arithmetic: how long a step or a transfer takes on one kind of instance.

    prefill step   a + b * tokens + c * sum(tokens * context)
    decode step    a + b * batch  + c * sum(context)
    transfer       alpha + bytes / bandwidth

A step that mixes both kinds pays the fixed part once (the shape of DistServe's and Splitwise's fitted models). The router
predicts with it, and the simulated runner takes its time from it.
"""

from __future__ import annotations

import msgspec

from core.hardware import Accelerator


class CostModel(msgspec.Struct, frozen=True, kw_only=True):
    """Coefficients in seconds for one (accelerator, model, parallelism, dtype).

    Attributes:
        step_s: fixed cost of any step.
        prefill_token_s: per new prompt token.
        attention_s: per (new token x context token) pair.
        decode_sequence_s: per sequence that decodes one token.
        decode_context_s: per context token read by decoding sequences.
        transfer_setup_s, transfer_bytes_per_s: the link that KV leaves by.
    """

    step_s: float = 2e-3
    prefill_token_s: float = 5e-5
    attention_s: float = 1e-9
    decode_sequence_s: float = 1e-4
    decode_context_s: float = 1e-7
    transfer_setup_s: float = 1e-3
    transfer_bytes_per_s: float = 1e9

    def prefill_s(self, tokens: int, context: int = 0) -> float:
        """Seconds to prefill `tokens` new tokens after `context` tokens that are already in the cache."""
        return self.step_s + self.prefill_token_s * tokens + self.attention_s * tokens * (context + tokens / 2)

    def decode_s(self, batch: int, context_tokens: int) -> float:
        """Seconds of one decode step over `batch` sequences that hold `context_tokens` in all."""
        return self.step_s + self.decode_sequence_s * batch + self.decode_context_s * context_tokens

    def mixed_s(self, prefill: list[tuple[int, int]], batch: int, context_tokens: int) -> float:
        """Seconds of a step that prefills chunks of `(tokens, context)` and decodes a batch beside them."""
        fixed_s = self.decode_s(batch, context_tokens)
        return fixed_s + sum(self.prefill_s(tokens, context) - self.step_s for tokens, context in prefill)

    def transfer_s(self, size_bytes: int) -> float:
        return self.transfer_setup_s + size_bytes / self.transfer_bytes_per_s


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """The few sizes that latency depends on. `parameters` counts those active for one token."""

    parameters: int
    layers: int
    query_heads: int
    head_dim: int
    kv_bytes_per_token: int
    weight_bytes: int


def roofline(shape: ModelShape, device: Accelerator, efficiency: float = 0.5) -> CostModel:
    """Coefficients from peak rates until somebody measures (the roofline of Williams et al., 2009).

    `efficiency` is the share of the peaks that real kernels are assumed to reach.
    """
    flops = device.flops * efficiency
    bandwidth = device.memory_bytes_per_s * efficiency
    return CostModel(
        step_s=shape.weight_bytes / bandwidth,
        prefill_token_s=2 * shape.parameters / flops,
        attention_s=4 * shape.layers * shape.query_heads * shape.head_dim / flops,
        decode_sequence_s=2 * shape.parameters / flops,
        decode_context_s=shape.kv_bytes_per_token / bandwidth,
        transfer_bytes_per_s=device.network_bytes_per_s,
    )
