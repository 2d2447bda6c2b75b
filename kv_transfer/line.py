"""A connection to one peer that was dialled and proved, and how it is made."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from core.errors import HandshakeRefused, TransferAborted, TransferError
from kv_transfer.carrier import Outgoing
from kv_transfer.protocol import Handshake, Peer
from kv_transfer.transport import Buffer, Connection, Transport

_log = logging.getLogger(__name__)


@dataclass
class Parcel:
    """Frames that leave as one message: whole ones, then the header of a piece and its bytes, then whole ones. `nbytes` counts
    the pieces' bytes alone."""

    head: list[Buffer] = field(default_factory=list)
    payload: memoryview | None = None
    tail: list[bytes] = field(default_factory=list)
    nbytes: int = 0

    def add_piece(self, header: bytes, payload: memoryview) -> None:
        if self.payload is not None:
            self.head.append(self.payload)
        self.head.append(header)
        self.payload = payload
        self.nbytes += payload.nbytes


class Line:
    """Whoever ships holds `wire`, so that parcels leave in the order in which it was taken."""

    def __init__(self, connection: Connection, peer: Peer, outgoing: Outgoing) -> None:
        self.connection = connection
        self.peer = peer
        self.outgoing = outgoing
        self.wire = threading.Lock()

    def ship(self, parcel: Parcel) -> None:
        """Raises TransferError if the connection or its carrier breaks."""
        if parcel.payload is not None:
            self.outgoing.ship(parcel.head, parcel.payload, parcel.tail)
        elif parcel.head or parcel.tail:
            self.send([*parcel.head, *parcel.tail])

    def send(self, parts: Sequence[Buffer]) -> None:
        self.connection.send(parts)

    def close(self) -> None:
        """Wakes whoever is inside; from any thread. Idempotent."""
        self.connection.close()
        self.outgoing.close()


class Dialler:
    """Makes lines to one endpoint, one at a time. `give_up` ends the dial under way, from any thread."""

    def __init__(self, endpoint: str, incarnation: int | None, transport: Transport, handshake: Handshake) -> None:
        self._endpoint = endpoint
        self._incarnation = incarnation
        self._transport = transport
        self._handshake = handshake
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._given_up = False

    def prepare(self) -> None:
        """A `give_up` from now on ends the next `dial`, even if it comes before it."""
        with self._lock:
            self._given_up = False

    def dial(self) -> Line:
        """Raises TransferError: nobody answers, the peer is not who it should be, or it was given up."""
        try:
            connection = self._transport.connect(self._endpoint)
        except ValueError as error:  # an endpoint that cannot even be looked up; it is a peer's word
            raise TransferError(f"cannot connect to {self._endpoint!r}: {error}") from error
        try:
            self._hold(connection)
            peer, outgoing = self._handshake.dial(connection)
        except BaseException:
            connection.close()
            raise
        line = Line(connection, peer, outgoing)
        try:
            self._hold(None)
            self._check_incarnation(peer)
        except TransferError:
            line.close()
            raise
        why = f" ({peer.declined})" if peer.declined else ""
        _log.info("KV to %s goes by %s%s", self._endpoint, peer.carrier, why)
        return line

    def give_up(self) -> None:
        with self._lock:
            self._given_up = True
            connection = self._connection
        if connection is not None:
            connection.close()

    def _hold(self, connection: Connection | None) -> None:
        with self._lock:
            self._connection = connection
            if self._given_up:
                self._connection = None
                raise TransferAborted(f"the connection to {self._endpoint} was given up")

    def _check_incarnation(self, peer: Peer) -> None:
        wanted, found = self._incarnation, peer.identity.incarnation
        if wanted is not None and wanted != found:
            message = f"incarnation: {self._endpoint} is incarnation {found} but the grant came from {wanted}"
            raise HandshakeRefused(message, "incarnation")
