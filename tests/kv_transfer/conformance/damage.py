"""Faults of payloads, wherever a carrier keeps them: what the peer reads is not what was digested."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from core.errors import TransferError
from kv_transfer.carrier import Acceptance, Carrier, Offer, Outgoing
from kv_transfer.transport import Buffer, Connection

Damage = Callable[[memoryview], None]


class DamagedCarrier:
    """Any carrier; `damage(payload)` sees each payload between its digest and its departure, and may change or refuse it."""

    def __init__(self, inner: Carrier, damage: Damage) -> None:
        self.name = inner.name
        self._inner = inner
        self._damage = damage

    def offer(self, piece_bytes: int) -> DamagedOffer:
        return DamagedOffer(self._inner.offer(piece_bytes), self._damage)

    def accept(self, details: bytes, piece_bytes: int) -> Acceptance:
        return self._inner.accept(details, piece_bytes)


class DamagedOffer:
    def __init__(self, inner: Offer, damage: Damage) -> None:
        self._inner = inner
        self._damage = damage
        self.details = inner.details

    def settle(self, connection: Connection, details: bytes) -> DamagedOutgoing:
        return DamagedOutgoing(self._inner.settle(connection, details), self._damage)

    def withdraw(self) -> None:
        self._inner.withdraw()


class DamagedOutgoing:
    def __init__(self, inner: Outgoing, damage: Damage) -> None:
        self.moves_bytes = inner.moves_bytes
        self._inner = inner
        self._damage = damage

    def room(self, size: int) -> memoryview:
        return self._inner.room(size)

    def ship(self, head: Sequence[Buffer], payload: memoryview, tail: Sequence[Buffer] = ()) -> None:
        try:
            self._damage(payload)
        except TransferError:
            self._inner.discard(payload)
            raise
        self._inner.ship(head, payload, tail)

    def discard(self, payload: memoryview) -> None:
        self._inner.discard(payload)

    def heard(self, note: bytes) -> None:
        self._inner.heard(note)

    def close(self) -> None:
        self._inner.close()
