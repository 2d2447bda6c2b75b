"""The seam between the protocol and whatever moves bytes: connected, ordered byte streams.

One thread may receive while others send. `close` may come from any thread at any time and wakes whoever is blocked.
Every failure is a `TransferError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

Buffer = bytes | bytearray | memoryview


class Connection(Protocol):
    def send(self, parts: Sequence[Buffer], *, wait: bool = True) -> None:
        """Send all parts, in order, as one message of the layer above; concurrent sends do not mix.

        With `wait=False` a peer that does not read is an error at once instead of a wait.

        Raises:
            TransferError: the connection is gone, or would have had to wait. It is closed then.
        """

    def recv_into(self, view: memoryview) -> None:
        """Fill `view`. Raises TransferError if the connection ends first."""

    def close(self) -> None:
        """Idempotent."""


class Listener(Protocol):
    @property
    def endpoint(self) -> str:
        """What `Transport.connect` takes."""

    def accept(self) -> Connection:
        """Raises TransferError once the listener is closed."""

    def close(self) -> None:
        """Idempotent; wakes `accept`."""


class Transport(Protocol):
    def listen(self) -> Listener: ...

    def connect(self, endpoint: str) -> Connection:
        """Raises TransferError if nobody answers there."""
