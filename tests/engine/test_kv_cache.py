"""How much KV cache is allocated, and what it looks like."""

from __future__ import annotations

import pytest
import torch

from core.config import EngineConfig
from core.errors import ConfigError
from core.groups import block_bytes
from core.layout import KVLayout, LayerShape
from engine.attention.base import LayerSpec
from engine.kv_cache import affordable_blocks, allocate, layout_of

CPU = torch.device("cpu")
LAYOUT = KVLayout.whole(layers=(LayerShape(2, 8, 4), LayerShape(1, 16, 16)), dtype="bfloat16", block_size=16)
BLOCK_BYTES = 16 * LAYOUT.bytes_per_token


def test_the_layout_is_read_off_the_layers():
    specs = [LayerSpec(0, 4, 2, 8, 4, 1.0), LayerSpec(1, 4, 1, 16, 16, 1.0)]
    assert layout_of(specs, torch.bfloat16, 16) == LAYOUT


def test_pages_have_the_layers_shapes_and_start_as_zeros():
    cache = allocate(LAYOUT, 5, CPU)
    assert [tuple(layer.key.shape) for layer in cache.layers] == [(5, 16, 2, 8), (5, 16, 1, 16)]
    assert [tuple(layer.value.shape) for layer in cache.layers] == [(5, 16, 2, 4), (5, 16, 1, 16)]
    assert all(tensor.dtype == torch.bfloat16 for layer in cache.layers for tensor in (layer.key, layer.value))
    assert not any(bool(tensor.any()) for layer in cache.layers for tensor in (layer.key, layer.value))
    size = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.key, layer.value))
    assert size == 5 * BLOCK_BYTES


def test_layers_with_windows_share_the_pages_of_others():
    shapes = [LayerShape(2, 8, 8, window) for window in (4, None, 4, 4, None, 4)]
    layout = KVLayout.whole(layers=shapes, dtype="float32", block_size=16)
    cache = allocate(layout, 5, CPU, scratch=True)
    assert [group.layers for group in cache.groups.groups] == [(0, 2), (3, 5), (1, 4)]
    for layers in (cache.layers, cache.layers_with_scratch):
        pages = [layer.key.data_ptr() for layer in layers]
        assert pages == [pages[0], pages[0], pages[2], pages[0], pages[2], pages[2]]
        assert pages[0] != pages[2]
    assert len({layer.value.data_ptr() for layer in cache.layers}) == 2
    owned = {layer.key.data_ptr(): layer for layer in cache.layers}.values()
    size = sum(t.numel() * t.element_size() for layer in owned for t in (layer.key, layer.value))
    assert size == 5 * block_bytes(layout, cache.groups) == 5 * 16 * layout.bytes_per_token // 3


def test_windows_need_less_for_as_many_sequences(monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1 << 40}))
    layout = KVLayout.whole(layers=[LayerShape(1, 1, 1, window) for window in (32, None)], dtype="float32", block_size=16)
    config = EngineConfig(max_num_seqs=3, max_num_batched_tokens=64)
    assert affordable_blocks(layout, config, CPU, max_model_len=1600) == 2 * 3 * (100 + 11)


def test_configured_bytes_are_filled_and_never_exceeded():
    config = EngineConfig(kv_bytes=10 * BLOCK_BYTES + 1)
    assert affordable_blocks(LAYOUT, config, CPU, max_model_len=64) == 10


def test_without_a_size_a_cpu_gives_a_share_of_free_memory_but_no_more_than_can_be_used(monkeypatch):
    class Memory:
        available = 8000 * BLOCK_BYTES

    monkeypatch.setattr("psutil.virtual_memory", lambda: Memory)
    config = EngineConfig(memory_utilization=0.5, max_num_seqs=1000)
    assert affordable_blocks(LAYOUT, config, CPU, max_model_len=1 << 20) == 1000
    assert affordable_blocks(LAYOUT, config.model_copy(update={"max_num_seqs": 3}), CPU, max_model_len=33) == 2 * 3 * 3


def test_a_cache_too_small_for_one_block_is_refused():
    with pytest.raises(ConfigError, match=r"engine\.kv_bytes"):
        affordable_blocks(LAYOUT, EngineConfig(kv_bytes=BLOCK_BYTES - 1), CPU, max_model_len=64)


def test_a_cache_too_large_for_the_machine_is_a_configuration_error():
    with pytest.raises(ConfigError, match="cannot allocate a KV cache"):
        allocate(LAYOUT, 1 << 50, CPU)
