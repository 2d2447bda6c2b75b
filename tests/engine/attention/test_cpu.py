"""The CPU kernel against dense attention in float64, over scrambled pages in which every slot not written holds NaN."""

from __future__ import annotations

import ctypes
import math
import platform
import shutil
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from engine import native_library
from engine.attention import cpu
from engine.attention.base import AttentionBatch, LayerCache, LayerSpec
from engine.attention.cpu import CpuAttention

BACKEND = CpuAttention()
Lengths = tuple[tuple[int, int], ...]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@dataclass(frozen=True)
class Case:
    """A ragged batch: `(context tokens, new tokens)` for each sequence, and what the layer asks for."""

    sequences: Lengths
    spec: LayerSpec
    dtype: torch.dtype = torch.float32
    block_size: int = 16
    seed: int = 0


@dataclass(frozen=True)
class World:
    """A case made flesh. `expected` is what dense attention in float64 says."""

    query: Tensor
    cache: LayerCache
    batch: AttentionBatch
    spec: LayerSpec
    sinks: Tensor | None
    expected: Tensor

    def attend(self) -> Tensor:
        return BACKEND.attend(self.query, self.cache, self.batch, self.spec, self.sinks)


def layer(query_heads: int = 6, kv_heads: int = 2, key_dim: int = 64, value_dim: int | None = None, **options: Any) -> LayerSpec:
    return replace(LayerSpec(0, query_heads, kv_heads, key_dim, value_dim or key_dim, key_dim**-0.5), **options)


def dense(query: Tensor, key: Tensor, value: Tensor, spec: LayerSpec, sinks: Tensor | None) -> Tensor:
    """Causal attention of the last `len(query)` of `len(key)` tokens, one score matrix per head, in float64."""
    group = spec.query_heads // spec.kv_heads
    key, value = (x.double().repeat_interleave(group, dim=1) for x in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query.double(), key) * spec.scale
    if spec.softcap:
        scores = spec.softcap * torch.tanh(scores / spec.softcap)
    age = torch.arange(len(key) - len(query), len(key))[:, None] - torch.arange(len(key))
    scores = scores.masked_fill((age < 0) | (age >= (spec.sliding_window or math.inf)), -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[:, None, None].expand(-1, len(query), 1)], dim=-1)
    weights = scores.softmax(dim=-1)[..., : len(key)]
    return torch.einsum("hqk,khd->qhd", weights, value)


def build(case: Case) -> World:
    """Random tensors; a token outside every query's window is never written, so its slot stays NaN."""
    generator = torch.Generator().manual_seed(case.seed)
    spec, size = case.spec, case.block_size

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(case.dtype)

    needed = [-(-context // size) for context, _ in case.sequences]
    blocks = torch.randperm(sum(needed) + 3, generator=generator).int()
    pages = (len(blocks), size, spec.kv_heads)
    cache = LayerCache(*(torch.full((*pages, dim), math.nan, dtype=case.dtype) for dim in (spec.key_dim, spec.value_dim)))
    tables = torch.zeros((len(needed), max(needed) + 1), dtype=torch.int32)
    sinks = noise(spec.query_heads).float() if spec.has_sinks else None
    queries, expected = [], []
    for row, ((context, new), own) in enumerate(zip(case.sequences, blocks.split([*needed, 3])[:-1], strict=True)):
        tables[row, : len(own)] = own
        key, value = noise(context, spec.kv_heads, spec.key_dim), noise(context, spec.kv_heads, spec.value_dim)
        first = max(0, context - new + 1 - spec.sliding_window) if spec.sliding_window else 0
        positions = torch.arange(first, context)
        BACKEND.write(key[first:], value[first:], cache, own.long()[positions // size] * size + positions % size)
        queries.append(noise(new, spec.query_heads, spec.key_dim))
        expected.append(dense(queries[-1], key, value, spec, sinks))
    contexts, counts = zip(*case.sequences, strict=True)
    batch = AttentionBatch(
        query_start=torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        context_lens=torch.tensor(contexts, dtype=torch.int32),
        block_tables=tables,
        slots=torch.zeros(0, dtype=torch.int64),
        max_query_len=max(counts),
        max_context_len=max(contexts),
    )
    return World(torch.cat(queries), cache, batch, spec, sinks, torch.cat(expected))


def assert_right(world: World) -> None:
    got = world.attend()
    assert got.dtype == world.query.dtype
    error = (got.double() - world.expected).abs().max() / world.expected.abs().max()
    assert float(error) <= TOLERANCE[got.dtype]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads, group = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 3, 7]))
    key_dim = draw(st.sampled_from([8, 33, 64, 80, 128]))
    contexts = draw(st.lists(st.sampled_from([1, 5, 63, 64, 65, 150, 300]), min_size=1, max_size=4))
    news = [draw(st.sampled_from(sorted({1, min(3, context), min(70, context), context}))) for context in contexts]
    return Case(
        tuple(zip(contexts, news, strict=True)),
        layer(
            kv_heads * group,
            kv_heads,
            key_dim,
            draw(st.sampled_from([key_dim, 16, 72])),
            sliding_window=draw(st.sampled_from([None, 1, 10, 64])),
            softcap=draw(st.sampled_from([None, 5.0])),
            has_sinks=draw(st.booleans()),
        ),
        draw(st.sampled_from([torch.float32, torch.bfloat16])),
        draw(st.sampled_from([1, 3, 16, 128])),
        draw(st.integers(0, 2**16)),
    )


@given(cases())
@settings(max_examples=100, deadline=None)
def test_agrees_with_dense_attention_and_reads_no_slot_outside_it(case: Case) -> None:
    assert_right(build(case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sequences", [((2100, 1), (700, 2)), ((900, 300), (513, 513), (1, 1))])
@pytest.mark.parametrize("window", [None, 300])
def test_agrees_over_several_ranges_and_tiles(
    sequences: tuple[tuple[int, int], ...], dtype: torch.dtype, window: int | None
) -> None:
    assert_right(build(Case(sequences, layer(sliding_window=window, has_sinks=True), dtype)))


@given(cases())
@settings(max_examples=30, deadline=None)
def test_a_sequence_gets_the_same_bits_alone_as_in_a_batch(case: Case) -> None:
    world = build(case)
    together = world.attend()
    for row in range(len(case.sequences)):
        first, last = (int(world.batch.query_start[i]) for i in (row, row + 1))
        alone = replace(
            world.batch,
            query_start=torch.tensor([0, last - first], dtype=torch.int32),
            context_lens=world.batch.context_lens[row : row + 1],
            block_tables=world.batch.block_tables[row : row + 1],
        )
        got = BACKEND.attend(world.query[first:last], world.cache, alone, world.spec, world.sinks)
        assert torch.equal(got, together[first:last])


def test_the_number_of_threads_does_not_change_a_bit() -> None:
    world = build(Case(((1500, 1), (400, 400), (40, 1)), layer(), torch.bfloat16))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(world.attend())
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_takes_queries_and_keys_as_transformers_lays_them_out() -> None:
    world = build(Case(((50, 20),), layer()))
    heads_first = world.query.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(replace(world, query=heads_first).attend(), world.attend())


@pytest.mark.skipif(platform.machine() != "x86_64", reason="names x86 instruction sets")
@pytest.mark.parametrize("isa", ["x86-64-v3", "x86-64-v4"])
def test_the_same_source_is_right_without_avx512_or_bf16_instructions(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if isa == "x86-64-v4" and "avx512vl" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor has no AVX-512")
    flags = tuple(f"-march={isa}" if flag == "-march=native" else flag for flag in native_library.FLAGS)
    library = ctypes.CDLL(str(native_library.build(cpu.SOURCE, flags)))
    worlds = [build(Case(((300, 70), (65, 1)), layer(softcap=5.0, sliding_window=100), dtype)) for dtype in TOLERANCE]
    monkeypatch.setattr(cpu, "_kernels", lambda: library)
    for world in worlds:
        assert_right(world)


def test_shares_torchs_openmp_runtime() -> None:
    assert BACKEND.unsupported(layer(), torch.float32, torch.device("cpu")) is None
    loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
    assert len(loaded) <= 1


def test_write_refuses_a_slot_outside_the_cache() -> None:
    world = build(Case(((5, 5),), layer()))
    rows = torch.zeros(1, 2, 64)
    for slot in (-1, world.cache.key.shape[0] * world.cache.key.shape[1]):
        with pytest.raises(IndexError, match=f"slot {slot} "):
            BACKEND.write(rows, rows, world.cache, torch.tensor([slot]))


def test_write_refuses_another_dtype() -> None:
    world = build(Case(((5, 5),), layer(), torch.bfloat16))
    rows = torch.zeros(1, 2, 64)
    with pytest.raises(TypeError, match="float32"):
        BACKEND.write(rows, rows, world.cache, torch.tensor([0]))


def test_attend_refuses_lengths_and_tables_that_cannot_be() -> None:
    world = build(Case(((40, 3),), layer()))
    few_blocks = replace(world.batch, block_tables=world.batch.block_tables[:, :2])
    bad_block = replace(world.batch, block_tables=torch.full_like(world.batch.block_tables, 99))
    short_context = replace(world.batch, context_lens=torch.tensor([2], dtype=torch.int32))
    for batch in (few_blocks, bad_block, short_context):
        with pytest.raises(IndexError):
            replace(world, batch=batch).attend()


@pytest.mark.parametrize(
    ("spec", "dtype", "device", "reason"),
    [
        (layer(), torch.float16, "cpu", "float16"),
        (layer(), torch.float32, "meta", "meta"),
        (layer(query_heads=5), torch.float32, "cpu", "do not divide"),
    ],
)
def test_says_why_it_cannot_serve_a_layer(spec: LayerSpec, dtype: torch.dtype, device: str, reason: str) -> None:
    assert reason in (BACKEND.unsupported(spec, dtype, torch.device(device)) or "")


def test_says_so_where_there_is_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(cpu, "_kernels", lambda: native_library.load(tmp_path / "absent.cpp"))
    assert "no C++ compiler" in (BACKEND.unsupported(layer(), torch.float32, torch.device("cpu")) or "")
