"""The seam that the roles use: how KV is sent and received, whatever moves it.

    prefill worker ── Sender.begin ──▶ SendSession.push ... finish      (or abort)
    decode worker  ── Receiver.open ── renew ...                        (or close)

`KVSender` and `KVReceiver` keep these promises over frames on a stream. A transport that reads or writes the peer's memory
one-sided keeps them in its own way. How a session ended is told by the events of `kv_transfer.events`, exactly one for each
session that its worker did not end itself.

What holds for every implementation:
- Threads: any method may be called from any thread; none waits for the network or for a device.
- A session's KV is committed whole, every byte's digest checked by the receiver, or not at all.
- What a peer can cause (refusal, loss, corruption, silence, nonsense in a grant) is an event with a typed `TransferError` for
  that session, never an exception. `ValueError` is for calls that no input from outside can bring about.
"""

from __future__ import annotations

from typing import Protocol

from core.groups import Tables
from kv_transfer.store import Fence
from kv_transfer.terms import Terms


class SendSession(Protocol):
    """One attempt's KV on its way into one grant. No method raises.

    A call that cannot be right (tokens without blocks, a finish before everything was pushed) fails the
    session with `SendFailed`, from the calling thread, and nothing else. Once the session has ended, `push` and `finish` do
    nothing: the event has told the worker, or is about to.
    """

    @property
    def attempt(self) -> str: ...

    @property
    def grant(self) -> int: ...

    @property
    def ended(self) -> bool: ...

    def push(self, layer: int, start: int, count: int, fence: Fence | None = None) -> None:
        """Tokens `[start, start + count)` of `layer` are in the store, or will be once `fence` has passed, and must stay there
        until the session ends. Tokens outside the grant, or pushed before, are skipped; any order will do. By default the fence
        is taken now: that is for callers on the thread that writes."""

    def finish(self, tail: bytes) -> None:
        """Everything has been pushed; `tail` (at most 32 KiB) goes to the receiving worker with the commit."""

    def abort(self, reason: str) -> bool:
        """Give up: once this returns, the store is no more read for the session. There is no event; the peer is told if it has
        heard of the session, which it has at the latest with the first push. Waits for at most one piece that is being read.
        False if the session had ended before."""


class Sender(Protocol):
    """The sending side of one store."""

    def begin(self, terms: Terms, endpoints: tuple[str, ...], tables: Tables, incarnation: int | None = None) -> SendSession:
        """Start sending what `terms` say of the sequence in `tables` to the grant.

        The session fails when the peer takes nothing that waits for it for a lease, or does not commit within one after the
        last frame. Waiting for pushes costs no lease.

        Args:
            endpoints: of the receiving side, one for each of its ranks. A sender need not serve any number of them.
            tables: one for each of the store's groups. Kept by reference: until the last push they may grow at their ends, and
                lose at their starts what windows have left. If the engine takes other blocks back (preempts), `abort` first.
            incarnation: the receiver's, if the caller knows it; another one there fails the session.

        All but `tables` is a peer's word: what is wrong with it, or differs from what the receiver was told, fails the session
        by an event.

        Raises:
            ValueError: `terms.num_tokens`, which is the caller's own, is negative; another number of tables.
            TransferAborted: the sender is closed.
        """

    def close(self) -> None:
        """Fail every session (with `SendFailed`); returns when nothing is read any more and all threads have ended.
        Idempotent. Not to be called from an event's handler."""


class Receiver(Protocol):
    """The receiving side of one store."""

    @property
    def endpoint(self) -> str:
        """What senders are told to begin at."""

    @property
    def open_grants(self) -> int: ...

    def open(self, terms: Terms, tables: Tables) -> None:
        """Let the sender of `terms.attempt` fill what `terms` say of the sequence in `tables`, one for each of the store's
        groups.

        Until an event about it, or `close`, the blocks belong to the transfer. The lease runs from now, from each sign of life
        of the sender's session and from each `renew`. If the terms are windowed, what no sliding window sees any more is not
        sent, and the blocks hold rubbish there.

        Raises:
            ValueError: the grant is open already, there cannot be such terms, or what goes over has no blocks.
            TransferAborted: the receiver has stopped.
        """

    def renew(self, grant: int) -> bool:
        """Start its lease anew. False if it is not open (any more)."""

    def close(self, grant: int, reason: str) -> bool:
        """Take the blocks back: once this returns, nothing of the grant is ever written. Its sender is told; there is no
        event. Waits for at most one piece that is being stored. False if the grant is not open (any more)."""

    def stop(self) -> None:
        """End every grant (with `Broken`); returns when nothing is written any more and all threads have ended.
        Idempotent. Not to be called from an event's handler."""
