"""Two ranks of gloo for one connection: a group of its own, which nothing else in the process knows.

Made from gloo's own classes, beside `torch.distributed`'s default group and never through it. The addresses that two ranks need
of each other, for which a job would ask a TCPStore, travel over the connection that has just shaken hands, so that no further
port listens for them; what listens is one gloo socket on the configured host. It takes whoever comes first, so a pair is used
only once each side has proved over it that it is the other end of the connection.

What ends an operation, tried with torch 2.13: its own time limit; and, as long as none of its bytes have moved, whatever breaks
the group, which is the peer's end of the socket closing or *another* operation's limit running out. `abort`, `shutdown` and
dropping the group end nothing; and what is half done, nothing but its limit ends, not even the peer's death. So nobody waits in
gloo who has anything else to do:

- one thread waits for the operations, one after the other; who began them waits for an event instead;
- another waits for a message that nobody ever sends. It is never half done, so it ends as soon as the pair breaks, and all moves
  with it;
- `close` asks for one more such message and gives it a millisecond, which breaks the pair.

After that, an operation that was half done keeps the first thread, its buffer and gloo's descriptors until its limit.

What gloo does not guard against: somebody who announces more bytes than were asked for ends this process (gloo aborts), be it the
peer or whoever came to the socket before it. Between processes that run this file it cannot come to that, because lengths come
from headers whose digests were checked.
"""

from __future__ import annotations

import hmac
import queue
import secrets
import threading
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist

from core.errors import CorruptTransfer, TransferError
from kv_transfer.carriers.gloo_rendezvous import MAC_BYTES, Rank, Rendezvous, mac
from kv_transfer.transport import Connection

GLOO_TIMEOUT_S = 1.0  # gloo waits five times this for a peer to connect
PROOF_TIMEOUT_S = 5.0
HALF_DONE_S = 0.25  # how long to wait for a thread that only a half done move can keep

_PAYLOAD_TAG = 0

Group = Any  # dist.ProcessGroupGloo, whose stub lacks half its methods


class Move:
    """One payload's way through the pair."""

    def __init__(self, what: Literal["send", "receive"], data: memoryview, timeout_s: float) -> None:
        self.what = what
        self.data = data  # gloo knows where it is, and does not keep it alive
        self.timeout_s = timeout_s
        self._over = threading.Event()
        self._failure: str | None = None

    def end(self, failure: str | None = None) -> None:
        self._failure = failure
        self._over.set()

    def wait(self) -> None:
        """Raises TransferError: the pair broke or was closed first, or it took too long, which breaks the pair."""
        self._over.wait()
        if self._failure is not None:
            raise TransferError(self._failure)


class GlooPair:
    """This process's end of a pair, made and proved. Any thread may begin moves, and `close`. Two threads of its own.

    Making one blocks, for about 10 s at most, until the peer has come too.

    Args:
        connection: brings the addresses; nothing else may be on its way meanwhile. Closing it ends a wait for them.
        rank: 0 on the dialling side.
        host: where gloo listens, and from where its address is taken.

    Raises:
        TransferError: no pair came about.
    """

    def __init__(self, connection: Connection, key: bytes, rank: Rank, host: str) -> None:
        self._peer = 1 - rank
        self._lock = threading.Lock()
        self._moves: list[Move] = []
        self._failure: str | None = None
        self._begun: queue.SimpleQueue[tuple[Move, Any] | None] = queue.SimpleQueue()
        self._store = Rendezvous(connection, key, rank)  # gloo does not keep its Python half alive
        self._group: Group | None = _group(self._store, rank, host)
        # Nothing of gloo in a variable: errors keep frames, and frames what is in them.
        self._watching = threading.Thread(target=self._watch, args=(self._unsent(self._group),), name="gloo watch", daemon=True)
        self._following = threading.Thread(target=self._follow, name="gloo moves", daemon=True)
        self._watching.start()
        self._following.start()
        try:
            self._prove(key, rank)
        except TransferError:
            self.close()
            raise

    def send(self, data: memoryview, timeout_s: float) -> Move:
        """`data` leaves when the peer asks for it, and must stay as it is until then. Raises TransferError if the pair is
        closed or broken."""
        return self._begin(Move("send", data, timeout_s))

    def receive(self, out: memoryview, timeout_s: float) -> Move:
        """Fill `out` with the peer's next. Raises as `send`."""
        return self._begin(Move("receive", out, timeout_s))

    def close(self) -> None:
        """Ends all moves, here and at the peer, at once. Idempotent; returns when its threads have ended, but for what a move
        that was half done may still hold."""
        self._break("the pair is closed")
        with self._lock:
            if self._group is None:
                return
            with suppress(RuntimeError):
                self._unsent(self._group).wait(timedelta(milliseconds=1))
            self._group = None
        self._begun.put(None)
        self._watching.join()
        self._following.join(HALF_DONE_S)

    def _begin(self, move: Move) -> Move:
        tensor = torch.frombuffer(move.data, dtype=torch.uint8)
        with self._lock:
            if self._group is None or self._failure is not None:
                raise TransferError(self._failure or "the pair is closed")
            try:
                begin = self._group.send if move.what == "send" else self._group.recv
                self._begun.put((move, begin([tensor], self._peer, _PAYLOAD_TAG)))
            except RuntimeError as error:
                raise TransferError(f"gloo cannot {move.what}: {str(error)[:300]}") from None
            finally:
                begin = None  # an error keeps its frames, and they their variables: gloo would live as long as the error
            self._moves.append(move)
        return move

    def _unsent(self, group: Group) -> Any:
        """The receipt of a message that the peer never sends."""
        never = torch.empty(1, dtype=torch.uint8)
        return group.recv([never], self._peer, 1 + secrets.randbelow(1 << 30))

    def _follow(self) -> None:
        while (begun := self._begun.get()) is not None:
            move, work = begun
            try:
                work.wait(timedelta(seconds=move.timeout_s))
            except RuntimeError as error:
                self._break(f"gloo cannot {move.what}: {str(error)[:300]}")
            else:
                with self._lock:
                    if move in self._moves:
                        self._moves.remove(move)
                        move.end()
            begun = work = None

    def _watch(self, unsent: Any) -> None:
        try:
            unsent.wait(timedelta(days=3650))
        except RuntimeError as error:
            self._break(f"gloo's pair broke: {str(error)[:300]}")
        else:
            self._break("the peer has sent what nobody sends")

    def _break(self, failure: str) -> None:
        with self._lock:
            if self._failure is None:
                self._failure = failure
            moves, self._moves = self._moves, []
            for move in moves:
                move.end(self._failure)

    def _prove(self, key: bytes, rank: Rank) -> None:
        mine, theirs = mac(key, b"pair", rank), mac(key, b"pair", 1 - rank)
        got = bytearray(MAC_BYTES)
        if rank == 0:
            self.send(memoryview(bytearray(mine)), PROOF_TIMEOUT_S).wait()
        self.receive(memoryview(got), PROOF_TIMEOUT_S).wait()
        if not hmac.compare_digest(bytes(got), theirs):
            raise CorruptTransfer("somebody else has come to this pair")
        if rank == 1:
            self.send(memoryview(bytearray(mine)), PROOF_TIMEOUT_S).wait()


def _group(store: Rendezvous, rank: Rank, host: str) -> Group:
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # the stub names another class
    try:
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._threads = 1
        options._timeout = timedelta(seconds=GLOO_TIMEOUT_S)
        return dist.ProcessGroupGloo(store, rank, 2, options)
    except RuntimeError as error:
        raise TransferError(f"gloo's two ranks cannot meet: {str(error)[:300]}") from None
    finally:
        options = None  # see GlooPair._begin
