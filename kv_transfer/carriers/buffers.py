"""Host buffers that a carrier takes turns with."""

from __future__ import annotations

import threading

from core.errors import TransferError

BUFFERS = 2  # one is filled while the other is emptied


class Buffers:
    """`BUFFERS` buffers of one size, made when first needed and kept, so that each is touched anew only once."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self._free: list[memoryview] = []
        self._made = 0
        self._closed = False

    def take(self, size: int) -> memoryview:
        """Waits until one is free. Raises TransferError once closed."""
        with self._changed:
            while not self._closed and not self._free and self._made == BUFFERS:
                self._changed.wait()
            if self._closed:
                raise TransferError("the connection is closed")
            if not self._free:
                self._free.append(memoryview(bytearray(self._size)))
                self._made += 1
            return self._free.pop()[:size]

    def give(self, view: memoryview) -> None:
        with self._changed:
            self._free.append(memoryview(view.obj))
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
