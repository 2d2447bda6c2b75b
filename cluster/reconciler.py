"""What should run against what does: decides which members to start, to kill, and to give up on. Pure; time is a parameter.

    ABSENT ──start──▶ STARTING ──ready──▶ READY
       ▲                 │                  │
       └──(backoff)── ended ◀───────────────┘          never ready: too many failed starts, or a hopeless one ──▶ GIVEN_UP

Invariants:
- A member never has two live incarnations: it is started again only after the last one was seen to end.
- Every start carries a higher incarnation than the one before; that number fences the dead everywhere else.
- Reports about any incarnation but the current one change nothing.
- A member that was ready once is never given up: what it lost (a node, a disk, a device) may come back.

The shape (target and observed state, one pure step between them) is that of Ray Serve's and Kubernetes' controllers.
Neighbour: `cluster.controller` feeds it reports and carries its actions out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum


class Phase(Enum):
    ABSENT = "absent"
    STARTING = "starting"
    READY = "ready"
    GIVEN_UP = "given up"


@dataclass(frozen=True)
class RestartPolicy:
    """How eagerly members are replaced.

    The first replacement is immediate; failures in a row then wait `backoff_s`, doubling up to `backoff_cap_s`. A member that
    has been ready for `settled_s` starts with a clean record. `max_failed_starts` in a row are the end of a member that never
    was ready; one that was is tried for ever. A start that takes longer than `start_timeout_s` is killed and counts as failed.
    """

    backoff_s: float = 0.5
    backoff_cap_s: float = 30.0
    settled_s: float = 30.0
    max_failed_starts: int = 5
    start_timeout_s: float = 1800.0

    def delay_s(self, failures: int) -> float:
        """Pause before the start that follows `failures` failures in a row."""
        if failures <= 1:
            return 0.0
        return min(self.backoff_cap_s, self.backoff_s * 2.0 ** min(failures - 2, 60))


@dataclass(frozen=True)
class Start:
    name: str
    incarnation: int


@dataclass(frozen=True)
class Kill:
    name: str
    incarnation: int
    reason: str


@dataclass(frozen=True)
class GiveUp:
    name: str
    failures: int
    reason: str


Action = Start | Kill | GiveUp


@dataclass
class Slot:
    """What is known of one member. `since_s` is when it entered its phase, `not_before_s` when it may start again, `condemned`
    why it was ordered to be killed, `reason` why it last ended."""

    name: str
    incarnation: int = 0
    phase: Phase = Phase.ABSENT
    since_s: float = 0.0
    not_before_s: float = 0.0
    failures: int = 0
    failed_starts: int = 0
    was_ready: bool = False
    hopeless: bool = False
    condemned: str = ""
    reason: str = ""

    @property
    def live(self) -> bool:
        return self.phase in (Phase.STARTING, Phase.READY)


class Reconciler:
    """Reports in by `ready` and `ended`, decisions out by `step`."""

    def __init__(self, names: Iterable[str], policy: RestartPolicy | None = None) -> None:
        self._policy = policy or RestartPolicy()
        self._slots = {name: Slot(name) for name in names}

    @property
    def slots(self) -> dict[str, Slot]:
        """By name. To read, not to change."""
        return self._slots

    @property
    def settled(self) -> bool:
        """Every member is ready or given up."""
        return all(slot.phase in (Phase.READY, Phase.GIVEN_UP) for slot in self._slots.values())

    def ready(self, name: str, incarnation: int, now_s: float) -> bool:
        """A member finished starting. False when that incarnation is not the one being started."""
        slot = self._current(name, incarnation)
        if slot is None or slot.phase is not Phase.STARTING or slot.condemned:
            return False
        slot.phase, slot.since_s, slot.failed_starts, slot.was_ready = Phase.READY, now_s, 0, True
        return True

    def ended(self, name: str, incarnation: int, reason: str, now_s: float, hopeless: bool = False) -> bool:
        """A member's process is gone. False when that incarnation is not live.

        `hopeless` says that starting it again would fail the same way. It is believed of members that never were ready: what
        worked once (a port, a folder on a shared disk) may work again.
        """
        slot = self._current(name, incarnation)
        if slot is None:
            return False
        if slot.phase is Phase.STARTING:
            slot.failed_starts += 1
            slot.failures += 1
        else:
            slot.failures = 1 if now_s - slot.since_s >= self._policy.settled_s else slot.failures + 1
        slot.phase, slot.since_s, slot.reason, slot.condemned = Phase.ABSENT, now_s, slot.condemned or reason, ""
        slot.not_before_s = now_s + self._policy.delay_s(slot.failures)
        slot.hopeless = hopeless
        return True

    def condemn(self, name: str, incarnation: int, reason: str) -> Kill | None:
        """A live member that has to go (it no longer answers). Its end is still to be reported by `ended`."""
        slot = self._current(name, incarnation)
        if slot is None or slot.condemned:
            return None
        slot.condemned = reason
        return Kill(name, incarnation, reason)

    def step(self, now_s: float) -> list[Action]:
        """What to do now. Each action is decided once: the caller carries out all of them."""
        return [action for slot in self._slots.values() if (action := self._decide(slot, now_s)) is not None]

    def wake_s(self, now_s: float) -> float | None:
        """Seconds until `step` may have something to do without any report; None when only reports matter."""
        due = [slot.not_before_s for slot in self._slots.values() if slot.phase is Phase.ABSENT]
        due += [
            slot.since_s + self._policy.start_timeout_s
            for slot in self._slots.values()
            if slot.phase is Phase.STARTING and not slot.condemned
        ]
        return max(0.0, min(due) - now_s) if due else None

    def _decide(self, slot: Slot, now_s: float) -> Action | None:
        if slot.phase is Phase.ABSENT:
            if not slot.was_ready and (slot.hopeless or slot.failed_starts >= self._policy.max_failed_starts):
                slot.phase, slot.since_s = Phase.GIVEN_UP, now_s
                return GiveUp(slot.name, slot.failures, slot.reason)
            if now_s >= slot.not_before_s:
                slot.incarnation += 1
                slot.phase, slot.since_s = Phase.STARTING, now_s
                return Start(slot.name, slot.incarnation)
        elif slot.phase is Phase.STARTING and now_s - slot.since_s >= self._policy.start_timeout_s:
            return self.condemn(slot.name, slot.incarnation, f"not ready after {self._policy.start_timeout_s:g} s")
        return None

    def _current(self, name: str, incarnation: int) -> Slot | None:
        slot = self._slots.get(name)
        return slot if slot is not None and slot.live and slot.incarnation == incarnation else None
