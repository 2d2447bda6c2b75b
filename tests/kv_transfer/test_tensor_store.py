"""The tensor store on the CPU: the same bytes as a plain byte store, in the engine's own memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from core.groups import NO_BLOCK
from core.layout import LayerShape
from kv_transfer.byte_store import ByteStore
from kv_transfer.tensor_store import LayerTensors, TensorStore
from tests.kv_transfer.rig import SHAPES, filled, layout


def tensors(dtype: torch.dtype, block_size: int = 4, num_blocks: int = 8) -> list[LayerTensors]:
    return [
        (
            torch.zeros(num_blocks, block_size, shape.kv_heads, shape.key_dim, dtype=dtype),
            torch.zeros(num_blocks, block_size, shape.kv_heads, shape.value_dim, dtype=dtype),
        )
        for shape in SHAPES
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("blocks", [[2, 3, 4], [7, 0, 3]])
def test_tensors_and_bytes_agree_on_every_piece(dtype: str, blocks: list[int]) -> None:
    layers = tensors(getattr(torch, dtype))
    store, plain = TensorStore(layers, layout(4, dtype)), ByteStore(layout(4, dtype), 8)
    source = filled(layout(4, dtype), 8)
    for layer in range(len(SHAPES)):
        for start, count in ((0, 12), (1, 2), (3, 6), (4, 4), (11, 1)):
            size = count * source.layout.layer_bytes_per_token(layer)
            piece, back = bytearray(size), bytearray(size)
            source.read(layer, [1, 5, 6], start, count, memoryview(piece))
            store.write(layer, blocks, start, count, memoryview(piece).toreadonly())
            plain.write(layer, blocks, start, count, memoryview(piece))
            store.read(layer, blocks, start, count, memoryview(back))
            assert back == piece
        for tensor, page in zip(layers[layer], plain.pages[layer], strict=True):
            assert np.array_equal(tensor.view(torch.uint8).numpy().reshape(page.shape), page)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_different_groups_share_tensors_and_not_blocks(dtype: str) -> None:
    shapes = [LayerShape(2, 3, 2, window) for window in (6, None, 6, None)]
    kind, shape = layout(4, dtype, shapes), (8, 4, 2)
    pages = [tuple(torch.zeros(*shape, dim, dtype=getattr(torch, dtype)) for dim in (3, 2)) for _ in range(2)]
    store, source = TensorStore([pages[0], pages[0], pages[1], pages[1]], kind), filled(kind, 8)
    assert [group.layers for group in store.groups.groups] == [(0, 2), (1, 3)]
    tables, pieces = ([NO_BLOCK, 5, 2], [7, 3, 0]), {}
    for layer in range(4):
        pieces[layer] = bytearray(6 * kind.layer_bytes_per_token(layer))
        source.read(layer, [1, 4, 6], 5, 6, memoryview(pieces[layer]))
        store.write(layer, tables[layer % 2], 5, 6, memoryview(pieces[layer]))
    for layer, piece in pieces.items():
        back = bytearray(len(piece))
        store.read(layer, tables[layer % 2], 5, 6, memoryview(back))
        assert back == piece
    with pytest.raises(ValueError, match="-1"):
        store.write(0, tables[0], 3, 2, memoryview(bytes(2 * kind.layer_bytes_per_token(0))))


def test_a_write_lands_in_the_token_it_names() -> None:
    layers = tensors(torch.float32)
    row = torch.arange(10, dtype=torch.float32)  # layer 0: two heads of three for the key, of two for the value
    TensorStore(layers, layout(4, "float32")).write(0, [6, 2], 5, 1, memoryview(row.numpy()).cast("B"))
    key, value = layers[0]
    assert key[2, 1].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert value[2, 1].tolist() == [[6, 7], [8, 9]]
    assert int(key.count_nonzero() + value.count_nonzero()) == 9


def test_what_the_engine_writes_can_be_read_without_a_fence() -> None:
    layers = tensors(torch.bfloat16)
    store = TensorStore(layers, layout(4))
    layers[1][0][3, 2] = 1.5
    out = bytearray(store.layout.layer_bytes_per_token(1))
    store.read(1, [3], 2, 1, memoryview(out))
    assert torch.frombuffer(out, dtype=torch.bfloat16).tolist() == [1.5] * 4 + [0.0] * 4
    assert store.fence() is None


@pytest.mark.parametrize("wrong", ["layers", "shape", "dtype", "strided"])
def test_tensors_that_are_not_what_the_layout_says_are_refused(wrong: str) -> None:
    layers = tensors(torch.float32 if wrong == "dtype" else torch.bfloat16, 5 if wrong == "shape" else 4)
    if wrong == "layers":
        layers.pop()
    if wrong == "strided":
        key, value = layers[0]
        layers[0] = (key.transpose(2, 3).contiguous().transpose(2, 3), value)
    with pytest.raises(ValueError, match="expected"):
        TensorStore(layers, layout(4))
