"""Numbers that cross between host and device while neither waits for the other."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch


def upload(values: Rows[float], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A tensor `[n]` on the device. On a GPU the copy joins the current stream."""
    host = torch.tensor(values, dtype=dtype)
    return host if device.type == "cpu" else host.pin_memory().to(device, non_blocking=True)


class Fetch:
    """Tensors on their way to the host; on a GPU the copies join the current stream."""

    def __init__(self, *tensors: torch.Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        if all(tensor.device.type == "cpu" for tensor in tensors):
            self._host = tensors
            return
        self._host = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors)
        for host, tensor in zip(self._host, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        self._arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._arrived.record()

    @property
    def ready(self) -> bool:
        """Whether `wait` would return at once."""
        return self._arrived is None or bool(self._arrived.query())  # type: ignore[no-untyped-call]

    def wait(self) -> tuple[torch.Tensor, ...]:
        """The tensors on the host."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


def some(rows: torch.Tensor, places: list[int]) -> torch.Tensor:
    """Those rows; no copy where that is all of them, in order."""
    if len(places) == len(rows):
        return rows
    if len(places) == 1:
        return rows[places[0]][None]
    return rows.index_select(0, upload(places, torch.long, rows.device))


def put(rows: torch.Tensor, places: list[int], values: torch.Tensor) -> None:
    """Write what `some` gave back to its place."""
    if values.data_ptr() == rows[places[0]].data_ptr():
        return
    if len(places) == len(rows):
        rows.copy_(values)
    else:
        rows.index_copy_(0, upload(places, torch.long, rows.device), values)
