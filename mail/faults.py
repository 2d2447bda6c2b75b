"""Mail that misbehaves on purpose, as a plan says: for tests and failure drills. The twin of `kv_transfer.transports.fault`.

    peers = FaultyPeers(Peers(door), plan, later, name="decode-0")

A fault applies to one message on its way out; the receiver sees what a broken network and a restarted socket would show it:
messages missing, late, twice, or in another order. (ZeroMQ itself does neither of the last two on one connection, but a peer
that is connected to again, and the two connections of one gateway, do.) Contents are never changed: CURVE would notice.

The plan is a function of the message and its number, so the same plan makes the same faults; `RandomFaults` draws by hashing a
seed, so that neither threads nor ports change what it picks. Time is a function too: `later(seconds, action)` may be a
simulator's (virtual time, one thread), an event loop's `call_later`, or `AlarmClock.later` (real time, a thread of its own).
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import blake2b
from itertools import count

from core.messages import Message
from mail.peers import MessageSender


@dataclass(frozen=True)
class Drop:
    """The message never leaves."""


@dataclass(frozen=True)
class Delay:
    """The message leaves `seconds` later; others overtake it."""

    seconds: float


@dataclass(frozen=True)
class Duplicate:
    """The message leaves now, and once more `after_s` later."""

    after_s: float = 0.0


@dataclass(frozen=True)
class Reorder:
    """The message leaves right after the next one that leaves for the same peer, and at the latest after `at_most_s`."""

    at_most_s: float = 0.5


Fault = Drop | Delay | Duplicate | Reorder
Later = Callable[[float, Callable[[], object]], object]
"""Do something this many seconds from now."""


@dataclass(frozen=True)
class Letter:
    """What a plan decides on: the `number`-th message of its type that `sender` sends, from 0, and where it goes."""

    sender: str
    endpoint: str
    message: Message
    number: int


Plan = Callable[[Letter], Fault | None]


@dataclass(frozen=True)
class RandomFaults:
    """A plan that picks a `share` of the messages (of the types `of`, all if there is none), and for each of them one of
    `faults`, by seed, sender, type and number alone."""

    seed: int
    share: float
    faults: tuple[Fault, ...]
    of: tuple[type[Message], ...] = ()

    def __call__(self, letter: Letter) -> Fault | None:
        if self.of and not isinstance(letter.message, self.of):
            return None
        named = f"{self.seed}/{letter.sender}/{type(letter.message).__name__}/{letter.number}"
        drawn = blake2b(named.encode(), digest_size=16).digest()
        if int.from_bytes(drawn[:8], "big") >= self.share * 2**64:
            return None
        return self.faults[int.from_bytes(drawn[8:], "big") % len(self.faults)]


@dataclass(frozen=True, eq=False, slots=True)
class _Held:
    message: Message


class FaultyPeers:
    """Sends through `inner`, but for what `plan` says. Safe from several threads: late messages may leave on another one.

    `send` answers as `inner` does for a message that leaves at once, and True for any other: who sends is not told of faults.
    """

    def __init__(self, inner: MessageSender, plan: Plan, later: Later, name: str = "") -> None:
        self._inner = inner
        self._plan = plan
        self._later = later
        self._name = name
        self._lock = threading.RLock()
        self._numbers: dict[type[Message], int] = {}
        self._held: dict[str, list[_Held]] = {}
        self._closed = False

    @property
    def lost(self) -> int:
        return self._inner.lost

    def send(self, endpoint: str, message: Message) -> bool:
        with self._lock:
            number = self._numbers.get(type(message), 0)
            self._numbers[type(message)] = number + 1
            match self._plan(Letter(self._name, endpoint, message, number)):
                case Drop():
                    return True
                case Delay(seconds):
                    self._later(seconds, lambda: self._leave(endpoint, message))
                    return True
                case Reorder(at_most_s):
                    held = _Held(message)
                    self._held.setdefault(endpoint, []).append(held)
                    self._later(at_most_s, lambda: self._release(endpoint, held))
                    return True
                case Duplicate(after_s) if after_s > 0:
                    self._later(after_s, lambda: self._leave(endpoint, message))
                case Duplicate():
                    self._inner.send(endpoint, message)
            return self._leave(endpoint, message)

    def forget(self, endpoint: str) -> None:
        with self._lock:
            self._held.pop(endpoint, None)
            self._inner.forget(endpoint)

    def close(self, linger_s: float = 0.5) -> None:
        """Close `inner`. What is late by then never leaves."""
        with self._lock:
            self._closed = True
            self._held.clear()
            self._inner.close(linger_s)

    def _leave(self, endpoint: str, message: Message) -> bool:
        with self._lock:
            if self._closed:
                return False
            sent = self._inner.send(endpoint, message)
            for held in self._held.pop(endpoint, ()):
                self._inner.send(endpoint, held.message)
            return sent

    def _release(self, endpoint: str, held: _Held) -> None:
        """Nothing came after it in time: it leaves by itself."""
        with self._lock:
            waiting = self._held.get(endpoint, [])
            if held in waiting:
                waiting.remove(held)
                self._leave(endpoint, held.message)


class AlarmClock:
    """`later` in real time, on a thread of its own until `close`."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._alarms: list[tuple[float, int, Callable[[], object]]] = []
        self._order = count()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="late-mail", daemon=True)
        self._thread.start()

    def later(self, seconds: float, action: Callable[[], object]) -> None:
        """Safe from any thread."""
        with self._changed:
            heapq.heappush(self._alarms, (time.monotonic() + seconds, next(self._order), action))
            self._changed.notify()

    def close(self) -> None:
        """What is still to come never does."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while (action := self._next()) is not None:
            action()

    def _next(self) -> Callable[[], object] | None:
        with self._changed:
            while not self._closed:
                now_s = time.monotonic()
                if self._alarms and self._alarms[0][0] <= now_s:
                    return heapq.heappop(self._alarms)[2]
                self._changed.wait(self._alarms[0][0] - now_s if self._alarms else None)
            return None
