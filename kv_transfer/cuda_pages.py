"""Paged KV tensors in GPU memory, read and written through pinned host memory.

Ordering: the thread that launches steps records an event after the kernels it has enqueued (`fence`); a sender reads only
what lies before an event that has passed. `read` and `write` run on a stream of their own and return only when their copies
are done, so no order between this stream and the engine's is left to chance.
"""

from __future__ import annotations

import queue
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kv_transfer.paged_rows import check_tokens
from kv_transfer.store import Fence


class CudaFence:
    """A CUDA event on the calling thread's stream."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record(torch.cuda.current_stream(device))

    def passed(self) -> bool:
        return bool(self._event.query())  # type: ignore[no-untyped-call]


def _sleeping_event() -> torch.cuda.Event:
    """Waiting for it sleeps rather than spins, so that a transfer thread does not eat the engine's core."""
    return torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]


@dataclass
class _Lane:
    """What one call at a time needs: a stream, and pinned memory that grows to the largest piece seen."""

    stream: torch.cuda.Stream
    pinned: torch.Tensor


class CudaPages:
    """The CUDA half of `TensorStore`; `layers` as there."""

    def __init__(self, layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._device = layers[0][0].device
        self._num_blocks, self._block_size = layers[0][0].shape[:2]
        slots = self._num_blocks * self._block_size
        self._layers = [(_rows(key, slots), _rows(value, slots)) for key, value in layers]
        self._lanes: queue.LifoQueue[_Lane] = queue.LifoQueue()

    def fence(self) -> Fence:
        return CudaFence(self._device)

    def read(self, layer: int, blocks: Sequence[int], start: int, count: int, out: memoryview) -> None:
        size_bytes, slots = self._checked(layer, blocks, start, count, out.nbytes)
        if size_bytes == 0:
            return
        lane = self._take(size_bytes)
        try:
            with torch.cuda.stream(lane.stream):
                index = slots.to(self._device)
                at = 0
                for rows in self._layers[layer]:
                    gathered = rows.index_select(0, index).reshape(-1)
                    lane.pinned[at : at + gathered.numel()].copy_(gathered, non_blocking=True)
                    at += gathered.numel()
                self._finish(lane)
            torch.frombuffer(out, dtype=torch.uint8).copy_(lane.pinned[:size_bytes])
        finally:
            self._lanes.put(lane)

    def write(self, layer: int, blocks: Sequence[int], start: int, count: int, data: memoryview) -> None:
        size_bytes, slots = self._checked(layer, blocks, start, count, data.nbytes)
        if size_bytes == 0:
            return
        lane = self._take(size_bytes)
        try:
            # By numpy: `data` may be read-only, of which torch makes no tensor without a warning.
            lane.pinned[:size_bytes].numpy()[:] = np.frombuffer(data, dtype=np.uint8)
            with torch.cuda.stream(lane.stream):
                index = slots.to(self._device)
                at = 0
                for rows in self._layers[layer]:
                    width = rows.shape[1] * count
                    piece = lane.pinned[at : at + width].to(self._device, non_blocking=True)
                    rows.index_copy_(0, index, piece.view(count, -1))
                    at += width
                self._finish(lane)
        finally:
            self._lanes.put(lane)

    def _checked(self, layer: int, blocks: Sequence[int], start: int, count: int, given_bytes: int) -> tuple[int, torch.Tensor]:
        if not 0 <= layer < len(self._layers):
            raise ValueError(f"Got {layer = } but expected one of {len(self._layers)}")
        check_tokens(blocks, self._num_blocks, self._block_size, start, count)
        key, value = self._layers[layer]
        size_bytes = count * (key.shape[1] + value.shape[1])
        if given_bytes != size_bytes:
            raise ValueError(f"Got a buffer of {given_bytes} bytes but expected {size_bytes}")
        tokens = torch.arange(start, start + count)
        first = start // self._block_size
        ids = torch.tensor(blocks[first : -(-(start + count) // self._block_size)], dtype=torch.int64)
        slots = ids[tokens // self._block_size - first] * self._block_size + tokens % self._block_size
        return size_bytes, slots

    def _take(self, size_bytes: int) -> _Lane:
        try:
            lane = self._lanes.get_nowait()
        except queue.Empty:
            stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            lane = _Lane(stream, torch.empty(0, dtype=torch.uint8))
        if lane.pinned.numel() < size_bytes:
            lane.pinned = torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
        return lane

    def _finish(self, lane: _Lane) -> None:
        event = _sleeping_event()
        event.record(lane.stream)
        event.synchronize()


def _rows(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    """Shared memory as uint8 `[slots, row_bytes]`."""
    return tensor.detach().reshape(slots, -1).view(torch.uint8)
