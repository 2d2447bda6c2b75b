"""The reference backend against attention spelled out token by token, and the choice among backends."""

from __future__ import annotations

import math

import pytest
import torch

from core.errors import ConfigError
from engine.attention.base import AttentionBatch, LayerCache, LayerSpec
from engine.attention.sdpa import SdpaAttention
from engine.attention.select import select
from engine.attention.varlen import apply_sinks

CPU = torch.device("cpu")


def spec(**options: object) -> LayerSpec:
    fields = {"layer_index": 0, "query_heads": 4, "kv_heads": 2, "key_dim": 8, "value_dim": 6, "scale": 0.4}
    return LayerSpec(**{**fields, **options})


def plain_attention(query, keys, values, spec, sinks):
    """One query token per row, the last of `keys`; every step written out. `query[Q, H, D]`, `keys[N, KV, D]`."""
    context, rows = keys.shape[0], query.shape[0]
    out = torch.zeros(rows, spec.query_heads, spec.value_dim)
    for row in range(rows):
        position = context - rows + row
        first = 0 if spec.sliding_window is None else max(0, position - spec.sliding_window + 1)
        for head in range(spec.query_heads):
            kv = head // (spec.query_heads // spec.kv_heads)
            scores = [float(query[row, head] @ keys[i, kv]) * spec.scale for i in range(first, position + 1)]
            if spec.softcap is not None:
                scores = [spec.softcap * math.tanh(score / spec.softcap) for score in scores]
            weights = [math.exp(score) for score in scores]
            total = sum(weights) + (math.exp(float(sinks[head])) if sinks is not None else 0.0)
            for weight, i in zip(weights, range(first, position + 1), strict=True):
                out[row, head] += weight / total * values[i, kv]
    return out


def scenario(spec: LayerSpec, lengths: list[tuple[int, int]], block_size: int, poison: float = 0.0):
    """`lengths` are (context, new tokens). Blocks are handed out in a shuffled order; unused memory holds `poison`, and so
    does what a window has left, in blocks that belong to nobody."""
    generator = torch.Generator().manual_seed(len(lengths) * 100 + block_size)
    blocks_of = [-(-context // block_size) for context, _ in lengths]
    order = (torch.randperm(sum(blocks_of) + 3, generator=generator)).tolist()
    cache = LayerCache(
        torch.full((len(order), block_size, spec.kv_heads, spec.key_dim), poison),
        torch.full((len(order), block_size, spec.kv_heads, spec.value_dim), poison),
    )
    backend, tables, queries, wanted = SdpaAttention(), [], [], []
    sinks = torch.randn(spec.query_heads, generator=generator) if spec.has_sinks else None
    slots_all = []
    for (context, new), count in zip(lengths, blocks_of, strict=True):
        own = [order.pop() for _ in range(count)]
        tables.append(own + [0] * (max(blocks_of) - count))
        keys = torch.randn(context, spec.kv_heads, spec.key_dim, generator=generator)
        values = torch.randn(context, spec.kv_heads, spec.value_dim, generator=generator)
        slots = torch.tensor([own[i // block_size] * block_size + i % block_size for i in range(context)])
        left = 0 if spec.sliding_window is None else max(0, context - new - spec.sliding_window + 1)
        backend.write(keys[left:], values[left:], cache, slots[left:])
        tables[-1][: left // block_size] = order[:1] * (left // block_size)
        slots_all.append(slots[-new:])
        queries.append(torch.randn(new, spec.query_heads, spec.key_dim, generator=generator))
        wanted.append(plain_attention(queries[-1], keys, values, spec, sinks))
    starts = torch.tensor([0, *(new for _, new in lengths)]).cumsum(0)
    batch = AttentionBatch(
        query_start=starts.int(),
        context_lens=torch.tensor([context for context, _ in lengths], dtype=torch.int32),
        block_tables=torch.tensor(tables, dtype=torch.int32),
        slots=torch.cat(slots_all),
        max_query_len=max(new for _, new in lengths),
        max_context_len=max(context for context, _ in lengths),
    )
    got = backend.attend(torch.cat(queries), cache, batch, spec, sinks)
    return got, torch.cat(wanted)


@pytest.mark.parametrize(
    "options",
    [{}, {"sliding_window": 3}, {"softcap": 2.0}, {"has_sinks": True}, {"sliding_window": 4, "softcap": 1.5, "has_sinks": True}],
    ids=str,
)
@pytest.mark.parametrize("lengths", [[(9, 1), (1, 1), (14, 1)], [(7, 7)], [(11, 4), (5, 1), (3, 3), (8, 1)]], ids=str)
@pytest.mark.parametrize("block_size", [1, 4])
def test_pages_anywhere_in_memory_give_plain_attention(options, lengths, block_size):
    got, wanted = scenario(spec(**options), lengths, block_size)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-5)


def test_each_query_head_may_have_its_own_kv_head():
    got, wanted = scenario(spec(kv_heads=4), [(5, 2), (6, 1)], 2)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 2.0}, {"sliding_window": 2}, {"sliding_window": 1, "has_sinks": True}], ids=str
)
def test_nan_left_in_memory_by_others_does_not_reach_a_result(options):
    got, wanted = scenario(spec(**options), [(5, 1), (3, 1), (16, 4), (23, 1)], 4, poison=math.nan)
    torch.testing.assert_close(got, wanted, atol=2e-6, rtol=2e-5)


def test_sinks_can_be_applied_after_attention_from_the_log_sum_exp():
    scores, values = torch.randn(3, 2, 5, generator=torch.Generator().manual_seed(0)), torch.randn(5, 6)
    sinks = torch.tensor([0.3, -1.0])
    with_sinks = torch.cat([scores, sinks[None, :, None].expand(3, 2, 1)], -1).softmax(-1)[..., :-1] @ values
    torch.testing.assert_close(apply_sinks(scores.softmax(-1) @ values, scores.logsumexp(-1), sinks), with_sinks)


class Picky:
    """A backend that refuses layers with a window."""

    name = "picky"
    block_size_multiple = 256

    def unsupported(self, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> str | None:
        return None if spec.sliding_window is None else f"layer {spec.layer_index} has a window"


def test_auto_takes_the_first_backend_that_serves_every_layer_and_says_why_not_the_others():
    windowed = spec(layer_index=1, sliding_window=4)
    backends = [Picky(), SdpaAttention()]
    assert select("auto", [spec()], torch.float32, CPU, backends=backends).backend.name == "picky"
    selection = select("auto", [spec(), windowed], torch.float32, CPU, backends=backends)
    assert selection.backend.name == "sdpa"
    assert selection.refused == (("picky", "layer 1 has a window"),)


def test_a_backend_asked_for_by_name_is_refused_with_its_reason():
    with pytest.raises(ConfigError, match=r"engine\.attention: flash: .*(not installed|CUDA)"):
        select("flash", [spec()], torch.bfloat16, CPU)
    with pytest.raises(ConfigError, match="varlen: flash kernels run on CUDA, not on cpu"):
        select("varlen", [spec()], torch.bfloat16, CPU)
    with pytest.raises(ConfigError, match="expected auto or one of"):
        select("paper", [spec()], torch.bfloat16, CPU)


def test_a_block_size_that_a_backend_cannot_read_refuses_that_backend():
    backends = [Picky(), SdpaAttention()]
    assert select("auto", [spec()], torch.float32, CPU, block_size=16, backends=backends).backend.name == "sdpa"
    with pytest.raises(ConfigError, match="block_size 16 is not a multiple of 256"):
        select("picky", [spec()], torch.float32, CPU, block_size=16, backends=backends)
