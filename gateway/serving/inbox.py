"""Where the deltas of one HTTP request's generations wait for the task that writes them out.

Nothing is created per token: a put appends and, if the writer waits, wakes it once. A writer that is slower than the
tokens finds several deltas at its next turn and sends them as one.
"""

from __future__ import annotations

import asyncio

from core.errors import HetServeError
from gateway.text.token_reader import Delta


class ClientGone(Exception):
    """The client hung up."""


class Inbox:
    """Owned by one event loop; one reader."""

    def __init__(self) -> None:
        self._items: list[tuple[int, Delta]] = []
        self._error: HetServeError | ClientGone | None = None
        self._waiter: asyncio.Future[None] | None = None

    def put(self, index: int, delta: Delta) -> None:
        self._items.append((index, delta))
        self._wake()

    def fail(self, error: HetServeError | ClientGone) -> None:
        """End the stream after what is already here. The first error stays."""
        if self._error is None:
            self._error = error
        self._wake()

    async def get(self) -> list[tuple[int, Delta]]:
        """All deltas since the last call, at least one, as `(generation index, delta)`.

        Raises:
            HetServeError: a generation failed for good.
            ClientGone: nobody is left to read.
        """
        while not self._items:
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        if isinstance(self._error, ClientGone):
            raise self._error
        items, self._items = self._items, []
        return items

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
