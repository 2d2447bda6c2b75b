"""An engine's paged KV tensors as a KV store.

On the CPU the tensors' memory is shared as bytes and copied without torch, so that a transfer never starts torch's thread
pool beside the engine's. On CUDA, rows are gathered on a stream of the store's own and pass through pinned memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from core.groups import LayerGroups, layer_groups
from core.layout import KVLayout
from kv_transfer.cuda_pages import CudaPages
from kv_transfer.paged_rows import Bytes, HostPages
from kv_transfer.store import Fence

LayerTensors = tuple[torch.Tensor, torch.Tensor]


class TensorStore:
    """`layers[i]` is, of the i-th layer that the rank holds, `key[num_blocks, block_size, kv_heads, key_dim]` and
    `value[..., value_dim]`, contiguous, all on one device. Layers of different groups (`core.groups`) may share them.

    Raises:
        ValueError: the tensors are not what `layout` says.
    """

    def __init__(self, layers: Sequence[LayerTensors], layout: KVLayout) -> None:
        _check(layers, layout)
        self._layout = layout
        self._groups = layer_groups(layout)
        self._first = layout.shard.layers.start
        device = layers[0][0].device
        self._pages: HostPages | CudaPages
        if device.type == "cpu":
            self._pages = HostPages([(_as_bytes(key), _as_bytes(value)) for key, value in layers])
        elif device.type == "cuda":
            self._pages = CudaPages(layers)
        else:
            raise ValueError(f"Got KV tensors on {device} but expected cpu or cuda")

    @property
    def layout(self) -> KVLayout:
        return self._layout

    @property
    def groups(self) -> LayerGroups:
        return self._groups

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        self._pages.read(layer - self._first, blocks, start, count, out)

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        self._pages.write(layer - self._first, blocks, start, count, data)

    def fence(self) -> Fence | None:
        return self._pages.fence() if isinstance(self._pages, CudaPages) else None


def _check(layers: Sequence[LayerTensors], layout: KVLayout) -> None:
    if len(layers) != len(layout.layers):
        raise ValueError(f"Got {len(layers)} layers of tensors but expected {len(layout.layers)}")
    num_blocks, device = layers[0][0].shape[0], layers[0][0].device
    for index, (tensors, shape) in enumerate(zip(layers, layout.layers, strict=True)):
        for name, tensor, dim in (("key", tensors[0], shape.key_dim), ("value", tensors[1], shape.value_dim)):
            expected = (num_blocks, layout.block_size, shape.kv_heads, dim)
            if tuple(tensor.shape) != expected or tensor.dtype != getattr(torch, layout.dtype):
                found = f"{tuple(tensor.shape)} of {tensor.dtype}"
                raise ValueError(f"Got {name} of layer {index} = {found} but expected {expected} of {layout.dtype}")
            if not tensor.is_contiguous() or tensor.device != device:
                raise ValueError(f"Got {name} of layer {index} strided or on {tensor.device}, expected contiguous on {device}")


def _as_bytes(tensor: torch.Tensor) -> Bytes:
    """The tensor's own memory as uint8 `[num_blocks, block_size, row_bytes]`."""
    rows = tensor.detach().reshape(tensor.shape[0], tensor.shape[1], -1)
    array: Bytes = rows.view(torch.uint8).numpy()
    return array
