"""One session's place in its link: how far it is, on which line, and until when.

WAITING ──BEGIN──▶ BEGUN ──FINISH──▶ FINISHED ──commit──▶ ENDED        abort, a lease, a fault or a lost line: from anywhere
"""

from __future__ import annotations

import threading
from enum import Enum

from kv_transfer.line import Line
from kv_transfer.outbound import Outbound


class State(Enum):
    WAITING = "its BEGIN has not left"
    BEGUN = "the peer knows of it"
    FINISHED = "all has left; only the commit is missing"
    ENDED = "over; its event is or will be told, if there is one"


class LinkSession:
    """Fields are guarded by the link's lock; `reading` is held while the store is read.

    `line` is where it has begun, for as long as the peer there should hear of its end. `expires_s` is when the peer must have
    taken or committed something, None while nothing waits for the peer. `in_flight` counts the parcels that were packed and have
    not left. `started_s` is when its first piece was packed.
    """

    def __init__(self, outbound: Outbound, lease_s: float) -> None:
        self.outbound = outbound
        self.lease_s = lease_s
        self.reading = threading.Lock()
        self.state = State.WAITING
        self.line: Line | None = None
        self.expires_s: float | None = None
        self.in_flight = 0
        self.started_s: float | None = None

    @property
    def ended(self) -> bool:
        return self.state is State.ENDED

    def watch(self, now_s: float) -> None:
        """Something waits for the peer: it has a lease to take it, from when it began to wait."""
        if self.expires_s is None:
            self.expires_s = now_s + self.lease_s

    def shipped(self, now_s: float) -> None:
        """The peer has taken a parcel: what still waits has a new lease."""
        self.in_flight -= 1
        waits = self.state is State.FINISHED or self.in_flight > 0
        self.expires_s = now_s + self.lease_s if waits else None
