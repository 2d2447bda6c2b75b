"""Who is connected to a receiver: strangers who have yet to prove themselves, and members. No I/O but closing.

Strangers have a small budget of their own, and the one who has waited longest makes room for the next: so nobody without the
secret keeps a member out, who needs milliseconds to prove himself. Members have theirs.
"""

from __future__ import annotations

import threading
from collections import OrderedDict

from core.clock import Clock
from core.errors import TransferAborted
from kv_transfer.transport import Connection

MOST_STRANGERS = 64
MOST_MEMBERS = 1024
HANDSHAKE_TIMEOUT_S = 5.0


class Doorway:
    """Thread-safe. Closes the connections that it turns out; whoever serves them notices."""

    def __init__(self, clock: Clock, most_strangers: int = MOST_STRANGERS, most_members: int = MOST_MEMBERS) -> None:
        self._clock = clock
        self._most_strangers = most_strangers
        self._most_members = most_members
        self._lock = threading.Lock()
        self._strangers: OrderedDict[Connection, float] = OrderedDict()  # value: when its handshake must be done
        self._members: set[Connection] = set()

    def enter(self, connection: Connection) -> None:
        """A stranger: he has `HANDSHAKE_TIMEOUT_S` to prove himself."""
        with self._lock:
            self._strangers[connection] = self._clock.now() + HANDSHAKE_TIMEOUT_S
            turned_out = self._strangers.popitem(last=False)[0] if len(self._strangers) > self._most_strangers else None
        if turned_out is not None:
            turned_out.close()

    def prove(self, connection: Connection) -> None:
        """He is a member. Raises TransferAborted if he was turned out before, or there are too many members."""
        with self._lock:
            if self._strangers.pop(connection, None) is None:
                raise TransferAborted("the handshake took too long, or the receiver has stopped")
            if len(self._members) >= self._most_members:
                raise TransferAborted(f"{len(self._members)} senders are connected already")
            self._members.add(connection)

    def leave(self, connection: Connection) -> None:
        """It has ended."""
        with self._lock:
            self._strangers.pop(connection, None)
            self._members.discard(connection)

    def expire(self) -> float | None:
        """Turn out those whose handshake takes too long. Seconds until the next is due, or None."""
        late = []
        with self._lock:
            now_s = self._clock.now()
            while self._strangers:
                connection, until_s = next(iter(self._strangers.items()))
                if until_s > now_s:
                    break
                late.append(connection)
                del self._strangers[connection]
            left_s = until_s - now_s if self._strangers else None
        for connection in late:
            connection.close()
        return left_s

    def shut(self) -> None:
        """Turn everybody out. Whoever enters afterwards is the caller's."""
        with self._lock:
            everybody = [*self._strangers, *self._members]
            self._strangers.clear()
        for connection in everybody:
            connection.close()
