"""The CUDA attention backends against the reference backend on the same pages."""

from __future__ import annotations

import pytest
import torch

from engine.attention.base import AttentionBackend, AttentionBatch, LayerCache, LayerSpec
from engine.attention.flash import FlashAttention
from engine.attention.sdpa import SdpaAttention
from engine.attention.varlen import VarlenAttention

pytestmark = pytest.mark.gpu
BLOCK = 256
LENGTHS = [(700, 1), (300, 40), (1, 1), (513, 513), (256, 3), (900, 1)]


def scenario(spec: LayerSpec, dtype: torch.dtype, device: torch.device, lengths: list[tuple[int, int]]):
    """Pages in shuffled order, with random content, for `(context, new tokens)` sequences; and the queries."""
    generator = torch.Generator().manual_seed(0)
    counts = [-(-context // BLOCK) for context, _ in lengths]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, count in enumerate(counts):
        tables[row, :count] = torch.tensor([order.pop() for _ in range(count)], dtype=torch.int32)
    pages = [
        torch.randn(sum(counts) + 2, BLOCK, spec.kv_heads, dim, generator=generator).to(device, dtype)
        for dim in (spec.key_dim, spec.value_dim)
    ]
    news = torch.tensor([new for _, new in lengths])
    query = torch.randn(int(news.sum()), spec.query_heads, spec.key_dim, generator=generator).to(device, dtype)
    batch = AttentionBatch(
        query_start=torch.nn.functional.pad(news.cumsum(0), (1, 0)).int().to(device),
        context_lens=torch.tensor([context for context, _ in lengths], dtype=torch.int32, device=device),
        block_tables=tables.to(device),
        slots=torch.zeros(len(query), dtype=torch.long, device=device),
        max_query_len=int(news.max()),
        max_context_len=max(context for context, _ in lengths),
    )
    sinks = torch.randn(spec.query_heads, generator=generator).to(device) if spec.has_sinks else None
    return query, LayerCache(*pages), batch, sinks


def usable(backend: AttentionBackend, spec: LayerSpec, dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    reason = backend.unsupported(spec, dtype, device)
    if reason is not None:
        pytest.skip(reason)
    return backend


@pytest.mark.parametrize("backend", [VarlenAttention(), FlashAttention()], ids=lambda backend: backend.name)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "options", [{}, {"sliding_window": 100}, {"has_sinks": True}, {"softcap": 20.0}, {"kv_heads": 8}], ids=str
)
@pytest.mark.parametrize("lengths", [LENGTHS, [(context, 1) for context, _ in LENGTHS]], ids=["mixed", "decode"])
def test_a_kernel_agrees_with_the_reference_backend(cuda, backend, dtype, options, lengths):
    fields = {"layer_index": 0, "query_heads": 8, "kv_heads": 2, "key_dim": 64, "value_dim": 64, "scale": 0.125}
    spec = LayerSpec(**{**fields, **options})
    usable(backend, spec, dtype, cuda)
    query, cache, batch, sinks = scenario(spec, dtype, cuda, lengths)
    got = backend.attend(query, cache, batch, spec, sinks)
    exact = LayerCache(cache.key.float(), cache.value.float())
    wanted = SdpaAttention().attend(query.float(), exact, batch, spec, sinks)
    torch.testing.assert_close(got.float(), wanted, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("backend", [VarlenAttention(), FlashAttention()], ids=lambda backend: backend.name)
def test_what_is_written_is_what_the_reference_backend_writes(cuda, backend):
    spec = LayerSpec(0, 8, 2, 64, 64, 0.125)
    usable(backend, spec, torch.bfloat16, cuda)
    key, value = (torch.randn(5, 2, 64, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    slots = torch.tensor([300, 2, 511, 0, 77], device=cuda)
    caches = [LayerCache(*(torch.zeros(2, BLOCK, 2, 64, device=cuda, dtype=torch.bfloat16) for _ in range(2))) for _ in range(2)]
    backend.write(key, value, caches[0], slots)
    SdpaAttention().write(key, value, caches[1], slots)
    assert torch.equal(caches[0].key, caches[1].key)
    assert torch.equal(caches[0].value, caches[1].value)
    assert torch.equal(caches[0].key.flatten(0, 1)[slots], key)


def test_varlen_gives_the_same_bits_alone_and_in_a_crowd(cuda):
    spec = LayerSpec(0, 8, 2, 64, 64, 0.125)
    backend = usable(VarlenAttention(), spec, torch.bfloat16, cuda)
    query, cache, batch, _ = scenario(spec, torch.bfloat16, cuda, LENGTHS)
    crowd = backend.attend(query, cache, batch, spec)
    for row, (context, new) in enumerate(LENGTHS):
        first = int(batch.query_start[row])
        single = AttentionBatch(
            query_start=torch.tensor([0, new], dtype=torch.int32, device=cuda),
            context_lens=batch.context_lens[row : row + 1],
            block_tables=batch.block_tables[row : row + 1],
            slots=batch.slots[first : first + new],
            max_query_len=new,
            max_context_len=context,
        )
        assert torch.equal(backend.attend(query[first : first + new], cache, single, spec), crowd[first : first + new])
