"""The life of an attempt on one instance: one pure state machine for whoever reads its prompt, writes its tokens, or both.

              prefill half                              decode half
    WAITING   the prompt waits for blocks               the prefill side has not admitted the prompt
    ADMITTED  it has blocks and is being read           the reservation waits for blocks
    GRANTED   the decode side has room: KV goes out     KV comes in
    RUNNING   (never)                                   the KV is committed: tokens are being written
    ENDED     delivered, finished, failed, withdrawn    finished, failed, withdrawn

The whole of an attempt that one instance serves alone is RUNNING from the start.

The halves mirror each other. Each tells the other several times a lease where it stands (`core.messages.Renew`), and comparing
the two phases shows which message between them was lost:

    prefill half   decode half    what follows
    ADMITTED       WAITING        the decode half asks its engine for room
    ADMITTED       GRANTED        the decode half sends its grant (again)
    WAITING        ADMITTED       the prompt lost its blocks to an older claim: the decode half takes the request for room back,
    WAITING        GRANTED        or the room itself
    GRANTED        RUNNING        the commit was lost: the prefill half frees

Three leases run: on the gateway, which says that it still wants the attempt (`Keep`); on the other half, while this one cannot
go on without it; and the deadline. Whatever a lost message leaves behind, one of them ends.

No clock, no I/O: times come in, decisions go out. `mail.attempt_book` carries them out.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from core.errors import DeadlineExceeded, EngineFault, HetServeError, LeaseExpired


class Half(Enum):
    """What of an attempt an instance serves; the values are those of `Submit.stage`."""

    PREFILL = "prefill"
    DECODE = "decode"
    WHOLE = "local"


class Phase(Enum):
    WAITING = "waiting"
    ADMITTED = "admitted"
    GRANTED = "granted"
    RUNNING = "running"
    ENDED = "ended"


_NEXT: dict[Half, dict[Phase, frozenset[Phase]]] = {
    Half.PREFILL: {
        Phase.WAITING: frozenset({Phase.ADMITTED}),
        Phase.ADMITTED: frozenset({Phase.WAITING, Phase.GRANTED}),
        Phase.GRANTED: frozenset(),
    },
    Half.DECODE: {
        Phase.WAITING: frozenset({Phase.ADMITTED}),
        Phase.ADMITTED: frozenset({Phase.WAITING, Phase.GRANTED}),
        Phase.GRANTED: frozenset({Phase.WAITING, Phase.RUNNING}),
        Phase.RUNNING: frozenset(),
    },
    Half.WHOLE: {Phase.RUNNING: frozenset()},
}
"""Legal transitions. To ENDED one leads from everywhere; from ENDED none."""


class Ending(Enum):
    """Why an attempt is over on an instance."""

    FINISHED = "finished"
    DELIVERED = "delivered"
    CANCELLED = "cancelled"
    WITHDRAWN = "withdrawn by the other side"
    FAILED = "failed"


class Effect(Enum):
    """What follows from what the other half says."""

    SAY = "tell the other half at once where this one stands"
    RESERVE = "ask the engine for room"
    GRANT = "send the grant again"
    KEEP_OPEN = "KV goes out there: the lease of the transfer starts anew"
    TAKE_BACK = "give the room, or the place in the queue for it, back"
    RELEASE = "the other half has all it needs: free what is held for it"


@dataclass(frozen=True, slots=True)
class Told:
    """Who has to be told of an ending, apart from whoever asked for it."""

    gateway: bool = False
    peer: bool = False


class LifeCycle:
    """One attempt on one instance.

    Attributes:
        phase: where it stands.
        heard: number of the newest `Renew` of the other half that spoke of it. What is older, or comes twice, is void.

    Args:
        deadline_s: duration after which it fails.
        lease_s: silence after which the gateway, or the other half, counts as gone.
        now_s: the time of its arrival.
    """

    def __init__(self, half: Half, deadline_s: float, lease_s: float, now_s: float) -> None:
        self.half = half
        self.phase = Phase.RUNNING if half is Half.WHOLE else Phase.WAITING
        self.heard = 0
        self._deadline_s = deadline_s
        self._lease_s = lease_s
        self._expires_s = now_s + deadline_s
        self._gateway_until_s = now_s + lease_s
        self._peer_until_s = now_s + lease_s

    @property
    def ended(self) -> bool:
        return self.phase is Phase.ENDED

    @property
    def shared(self) -> bool:
        """Whether the other half is still to be told where this one stands."""
        return self.half is not Half.WHOLE and self.phase not in (Phase.RUNNING, Phase.ENDED)

    def move(self, to: Phase) -> None:
        """Raises EngineFault if no such transition exists: the fault of a caller, which ends this attempt alone."""
        if self.ended or (to is not Phase.ENDED and to not in _NEXT[self.half][self.phase]):
            raise EngineFault(f"an attempt's {self.half.value} half cannot go from {self.phase.value} to {to.value}")
        self.phase = to

    def end(self, ending: Ending) -> Told:
        """It is over here. Raises EngineFault if it was over before."""
        running = self.phase is Phase.RUNNING
        self.move(Phase.ENDED)
        if ending is Ending.FAILED:
            return Told(gateway=True, peer=not running)
        return Told(peer=ending is Ending.FINISHED and self.half is Half.PREFILL)

    def renewed(self, theirs: Phase, number: int, now_s: float) -> Effect | None:
        """The other half says, in its `Renew` of that number, where it stands."""
        if self.ended or number <= self.heard:
            return None
        self.heard = number
        self._peer_until_s = now_s + self._lease_s
        return _AT_DECODE.get((theirs, self.phase)) if self.half is Half.DECODE else self._at_prefill(theirs)

    def wanted(self, now_s: float) -> None:
        """The gateway still waits for it."""
        self._gateway_until_s = now_s + self._lease_s

    def alive(self, now_s: float) -> None:
        """A sign of life of the other half that says nothing of its phase."""
        self._peer_until_s = now_s + self._lease_s

    def overdue(self, now_s: float) -> HetServeError | None:
        """Why it must end now, if it must. While KV comes in, the receiver keeps the lease on the other half, because frames
        are signs of life too."""
        if now_s >= self._expires_s:
            return DeadlineExceeded(f"not finished within {self._deadline_s:g} s")
        if now_s >= self._gateway_until_s:
            return LeaseExpired(f"the gateway was silent for {self._lease_s:g} s")
        leans = self.shared and not (self.half is Half.DECODE and self.phase is Phase.GRANTED)
        if leans and now_s >= self._peer_until_s:
            other = "decode" if self.half is Half.PREFILL else "prefill"
            return LeaseExpired(f"the {other} side was silent for {self._lease_s:g} s")
        return None

    def _at_prefill(self, theirs: Phase) -> Effect | None:
        if self.phase is Phase.ADMITTED and theirs is Phase.WAITING:
            return Effect.SAY
        if self.phase is Phase.GRANTED and theirs is Phase.RUNNING:
            return Effect.RELEASE
        return None


_AT_DECODE: dict[tuple[Phase, Phase], Effect] = {
    (Phase.ADMITTED, Phase.WAITING): Effect.RESERVE,
    (Phase.ADMITTED, Phase.GRANTED): Effect.GRANT,
    (Phase.GRANTED, Phase.GRANTED): Effect.KEEP_OPEN,
    (Phase.WAITING, Phase.ADMITTED): Effect.TAKE_BACK,
    (Phase.WAITING, Phase.GRANTED): Effect.TAKE_BACK,
    (Phase.GRANTED, Phase.RUNNING): Effect.SAY,
}
"""(theirs, mine) at the decode half. A grant that is sent again does not renew its lease: a way on which grants, and only they,
are lost ends the attempt."""
