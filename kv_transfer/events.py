"""What a sender and a receiver tell their workers, from their own threads. Exactly one event ends each session, unless the
worker itself ended it (`SendSession.abort`, `Receiver.close`): then there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.errors import TransferError


@dataclass(frozen=True)
class Received:
    """All of the attempt's KV is in the store, every byte checked, and the sender has been told (if it still lives).

    `tail` is what the sender gave to `finish`; `transfer_s` is from the session's first piece of KV to the commit.
    """

    grant: int
    attempt: str
    tail: bytes
    kv_bytes: int
    transfer_s: float


@dataclass(frozen=True)
class Broken:
    """The grant is over: nothing of it will be written again, and what was written must not be used. `given_up` when its sender
    said so: the sender's worker knows why."""

    grant: int
    attempt: str
    error: TransferError
    given_up: bool = False


@dataclass(frozen=True)
class Delivered:
    """The receiver has committed. `transfer_s` is from the session's first piece of KV to the commit's arrival."""

    attempt: str
    kv_bytes: int
    transfer_s: float


@dataclass(frozen=True)
class SendFailed:
    """The attempt's KV did not arrive as far as this side knows; its store is no more read for it."""

    attempt: str
    error: TransferError


OnReceiverEvent = Callable[[Received | Broken], None]
OnSenderEvent = Callable[[Delivered | SendFailed], None]
