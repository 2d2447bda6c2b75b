"""The seam between frames and what carries their payloads.

Every frame's header goes over the ordered stream, and so does the body of every frame but DATA. The payload of a DATA frame,
which is nearly all bytes, travels beside its header by a *carrier*: behind the header on the stream itself, through memory
that both processes map, by a collective library. Which one is settled in the handshake, for each connection anew:

    dialling side    Carrier.offer ─── names and details ──▶  Carrier.accept of the first that both can    listening side
                     Offer.settle  ◀── name, details ───────  Acceptance.open
                     Outgoing      ═══ payloads ══════════▶   Incoming

What stays the same whatever the carrier: the order of frames, the digests, which are taken by the receiver over the bytes that
it reads out of the carrier before any of them is written, fences, leases, and how a session ends. A carrier that fails raises
TransferError, which costs its connection and the sessions on it, and nothing else; so does a peer that hangs: `close` may come
from any thread at any time and wakes whoever waits in the carrier.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from core.errors import TransferError
from kv_transfer.frames import Header
from kv_transfer.transport import Buffer, Connection

Tell = Callable[[bytes], None]


class CarrierUnavailable(TransferError):
    """This carrier cannot serve this pair; the message says why."""


class Outgoing(Protocol):
    """The sending end of one connection's payloads.

    One thread asks for room and fills it, one (the same, or another) ships; what was given first is shipped or discarded first.
    At least two rooms may be held at a time, so that one is filled while the other is on its way.
    """

    @property
    def moves_bytes(self) -> bool:
        """Whether `ship` itself moves the payload, so that the next one is better prepared meanwhile than behind it."""

    def room(self, size: int) -> memoryview:
        """`size` bytes (at least 1, at most the largest piece) to write the next payload into. Waits while the peer has not
        taken enough. Raises TransferError once closed or broken."""

    def ship(self, head: Sequence[Buffer], payload: memoryview, tail: Sequence[Buffer] = ()) -> None:
        """Send, as one message of the stream: `head`, which is whole control frames and the payload's header behind them;
        what the carrier needs there; `tail`, whole control frames. The room is the carrier's again, also if it raises.

        Raises:
            TransferError: the connection is gone, or the carrier broke.
        """

    def discard(self, payload: memoryview) -> None:
        """Give a room back unsent. Never raises."""

    def heard(self, note: bytes) -> None:
        """What the other end of this carrier told. Called by the thread that hears the peer's answers; must not wait.
        Raises TransferError on what no honest peer tells."""

    def close(self) -> None:
        """Let go of everything; wakes `room` and `ship`. Idempotent."""


class Incoming(Protocol):
    """The receiving end. At least two payloads may be held at a time, so that one is stored while the next arrives."""

    def take(self, header: Header) -> memoryview:
        """The `header.length` payload bytes of the DATA frame whose header was read from the stream just now: called once
        for each, in order, by the thread that reads the stream. They stay as they are until `release`.

        Raises:
            TransferError: the connection or the carrier ended, or broke, before they were there.
        """

    def release(self, payload: memoryview) -> None:
        """Done with a payload; in the order in which they were taken, by any thread. Never raises."""

    def close(self) -> None:
        """Let go of everything; wakes `take`. Idempotent."""


class Offer(Protocol):
    """A dialling side's end of a carrier that the listening side may still choose."""

    @property
    def details(self) -> bytes:
        """For `Carrier.accept` of the other side; at most a few hundred bytes."""

    def settle(self, connection: Connection, details: bytes) -> Outgoing:
        """It was chosen. Raises TransferError if it cannot be, after all."""

    def withdraw(self) -> None:
        """It was not chosen. Idempotent; nothing after `settle`."""


class Acceptance(Protocol):
    """A listening side's end of the carrier that it has chosen."""

    @property
    def details(self) -> bytes:
        """For `Offer.settle` of the other side."""

    def open(self, connection: Connection, tell: Tell) -> Incoming:
        """The handshake is over. `tell` brings a note of at most 1 KiB to `Outgoing.heard`, in order, without waiting; it
        never raises. Raises TransferError if the carrier cannot be used, after all."""

    def withdraw(self) -> None:
        """The handshake failed. Idempotent; nothing after `open`."""


class Carrier(Protocol):
    """One way for payloads, as one process has it. Thread-safe."""

    @property
    def name(self) -> str:
        """What peers and configuration call it."""

    def offer(self, piece_bytes: int) -> Offer:
        """On the dialling side, for payloads of at most `piece_bytes`. Raises CarrierUnavailable."""

    def accept(self, details: bytes, piece_bytes: int) -> Acceptance:
        """On the listening side; `details` are a proved peer's, but may be anything. Raises CarrierUnavailable."""
