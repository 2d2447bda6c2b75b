"""What the router knows of the cluster: one `Instance` per live worker, learned from heartbeats alone.

Invariants:
- Of one name, only the newest incarnation is ever visible; a heartbeat of an older one changes nothing.
- Times are of the caller's clock; nothing here reads one.
- A `Snapshot` never changes after it is made, so a decision can be replayed and explained.

Between two heartbeats the gateway's own assignments are added to an instance's load, so that a burst spreads instead of
landing on whoever looked idle last (the idea of Ray Serve's and llm-d's in-flight correction). `router.policy` decides
on snapshots; `gateway.serving.dispatcher` feeds this.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property

from core.config import Role
from core.errors import ProtocolError
from core.groups import LayerGroups, layer_groups
from core.layout import KVLayout, ModelKV, Shard
from core.messages import Address, Heartbeat, Load

InstanceKey = tuple[str, int]
"""Name and incarnation: what a worker is fenced by."""

SETTLE_S = 0.05
"""A heartbeat this much younger than an assignment is taken to count it already."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One live worker as last heard of, plus what was assigned to it since.

    What decisions look at again and again is worked out once, when the view is made.

    Attributes:
        kind: equal for instances whose KV is interchangeable (same fingerprint and layout).
        groups: which of its layers share blocks.
        capacity_tokens: the longest context that it could ever hold: by the model, and by the size of its cache.
        stuck: it has work and shows no sign of life.
        refusing: it turned work away (it drains, or its role changed) and no heartbeat has said since how it stands.
        waiting_tokens: prompt tokens that wait there or are on their way.
        sequences: sequences that run or wait there or are on their way.
        assigned_sequences, assigned_context_tokens: the part of it sent after the last heartbeat, and the context tokens
            that it will hold.
    """

    address: Address
    key: InstanceKey
    role: Role
    kind: int
    beat: Heartbeat
    last_seen_s: float
    kv_bytes_per_token: int
    groups: LayerGroups
    capacity_tokens: int
    stuck: bool
    refusing: bool
    waiting_tokens: int
    sequences: int
    assigned_sequences: int
    assigned_context_tokens: int

    @property
    def name(self) -> str:
        return self.address.name

    @property
    def load(self) -> Load:
        return self.beat.load

    @property
    def usable(self) -> bool:
        """Whether new work may go there."""
        return not (self.stuck or self.refusing or self.beat.load.draining)


@dataclass(frozen=True)
class Snapshot:
    """The cluster at one moment. `instances` are the live ones, including those no new work may go to."""

    instances: tuple[Instance, ...]

    @cached_property
    def prefill(self) -> tuple[Instance, ...]:
        """Usable instances that can prefill for another."""
        return tuple(item for item in self.instances if item.role is not Role.DECODE and item.usable)

    @cached_property
    def decode(self) -> tuple[Instance, ...]:
        """Usable instances that can decode."""
        return tuple(item for item in self.instances if item.role is not Role.PREFILL and item.usable)

    @cached_property
    def settling(self) -> bool:
        """Whether some instance's next heartbeat may say that it takes work after all."""
        return any(item.refusing for item in self.instances)

    @cached_property
    def max_model_len(self) -> int | None:
        """The longest context that some live instance can serve; None when none lives that decodes. The smaller ones are passed
        over for what is too long for them."""
        return max((item.capacity_tokens for item in self.instances if item.role is not Role.PREFILL), default=None)


@dataclass(slots=True)
class _Tracked:
    """Mutable record behind one instance."""

    beat: Heartbeat
    role: Role
    kind: int
    last_seen_s: float
    life_s: float
    kv_bytes_per_token: int
    groups: LayerGroups
    most_steps: int = 0
    stuck: bool = False
    refusing: bool = False
    assigned: deque[tuple[float, int, int, int]] = field(default_factory=deque)
    view: Instance | None = None

    def lives(self, heartbeat: Heartbeat) -> bool:
        """Whether the heartbeat shows a sign of life since the last one, or work that was not there before, or none."""
        before, after = self.beat.load, heartbeat.load
        aged = after.stalled_s >= before.stalled_s and after.step_age_s >= before.step_age_s
        return after.steps > self.most_steps or not aged or not _busy(after) or not _busy(before)

    def stalled(self, now_s: float, limit_s: float) -> bool:
        """Whether it says itself that it hangs, or has work and has shown no sign of life for `limit_s`."""
        load = self.beat.load
        return load.stalled_s > limit_s or (_busy(load) and now_s - self.life_s > limit_s)


class ClusterState:
    """Heartbeats in, snapshots out.

    Args:
        dead_after_s: silence after which an instance is dropped.
        stuck_after_s: an instance that says that it hangs since longer than this (`Load.stalled_s`), or that has work, running or
            waiting, and shows no sign of life for so long, is stuck until it moves. Signs of life are more steps, and an age
            (`stalled_s`, `step_age_s`) that began anew, as it does with each layer of a step: a long step is not a death.
    """

    def __init__(self, dead_after_s: float, stuck_after_s: float) -> None:
        self._dead_after_s = dead_after_s
        self._stuck_after_s = stuck_after_s
        self._tracked: dict[str, _Tracked] = {}
        self._newest: dict[str, int] = {}
        self._kinds: dict[tuple[str, ModelKV, Shard], int] = {}
        self._snapshot: Snapshot | None = None

    def observe(self, heartbeat: Heartbeat, now_s: float) -> InstanceKey | None:
        """Take in a heartbeat; returns the incarnation that it replaces, whose attempts are lost.

        Raises:
            ProtocolError: the role is not one.
        """
        name, incarnation = heartbeat.worker.name, heartbeat.worker.incarnation
        if incarnation < self._newest.get(name, incarnation):
            return None
        role = _role(heartbeat.role)
        before = self._tracked.get(name)
        self._newest[name] = incarnation
        self._snapshot = None
        if before is None or before.beat.worker.incarnation != incarnation:
            kind, layout = self._kind(heartbeat), heartbeat.layout
            self._tracked[name] = _Tracked(
                heartbeat, role, kind, now_s, now_s, layout.bytes_per_token, layer_groups(layout), heartbeat.load.steps
            )
            return None if before is None else (name, before.beat.worker.incarnation)
        if before.lives(heartbeat):
            before.life_s = now_s
        if heartbeat.fingerprint != before.beat.fingerprint or heartbeat.layout != before.beat.layout:
            before.kind, before.kv_bytes_per_token = self._kind(heartbeat), heartbeat.layout.bytes_per_token
            before.groups = layer_groups(heartbeat.layout)
        before.beat, before.role, before.last_seen_s, before.view = heartbeat, role, now_s, None
        before.most_steps = max(before.most_steps, heartbeat.load.steps)
        before.stuck, before.refusing = before.stuck and before.stalled(now_s, self._stuck_after_s), False
        while before.assigned and before.assigned[0][0] <= now_s - SETTLE_S:
            before.assigned.popleft()
        return None

    def sweep(self, now_s: float) -> list[InstanceKey]:
        """Drop the silent; returns those dropped and those newly stuck: attempts there must move."""
        lost: list[InstanceKey] = []
        for name, tracked in list(self._tracked.items()):
            if now_s - tracked.last_seen_s > self._dead_after_s:
                lost.append(self._drop(name))
            elif not tracked.stuck and tracked.stalled(now_s, self._stuck_after_s):
                tracked.stuck, tracked.view, self._snapshot = True, None, None
                lost.append((name, tracked.beat.worker.incarnation))
        return lost

    def was_deaf(self, seconds: float, now_s: float) -> None:
        """Nobody listened for so long, up to now: that is no silence of theirs."""
        for tracked in self._tracked.values():
            tracked.last_seen_s = min(now_s, tracked.last_seen_s + seconds)
            tracked.life_s = min(now_s, tracked.life_s + seconds)

    def lose(self, key: InstanceKey) -> bool:
        """Somebody knows that this incarnation is gone. False if it was not live here."""
        tracked = self._tracked.get(key[0])
        if tracked is None or tracked.beat.worker.incarnation != key[1]:
            return False
        self._drop(key[0])
        self._newest[key[0]] = key[1] + 1
        return True

    def refused(self, key: InstanceKey) -> None:
        """An instance turned work away that its last heartbeat had promised to take: give it none before the next one."""
        tracked = self._tracked.get(key[0])
        if tracked is not None and tracked.beat.worker.incarnation == key[1]:
            tracked.refusing, tracked.view, self._snapshot = True, None, None

    def assigned(self, key: InstanceKey, now_s: float, prefill_tokens: int, sequences: int, context_tokens: int) -> None:
        """Count work just sent to an instance until its heartbeats show it."""
        tracked = self._tracked.get(key[0])
        if tracked is not None and tracked.beat.worker.incarnation == key[1]:
            tracked.assigned.append((now_s, prefill_tokens, sequences, context_tokens))
            tracked.view = None
            self._snapshot = None

    def snapshot(self) -> Snapshot:
        """The cluster as it stands. Cheap when nothing changed since the last call."""
        if self._snapshot is None:
            self._snapshot = Snapshot(tuple(self._view(tracked) for tracked in self._tracked.values()))
        return self._snapshot

    def _view(self, tracked: _Tracked) -> Instance:
        if tracked.view is None:
            beat, load = tracked.beat, tracked.beat.load
            sequences = _total(tracked.assigned, 2)
            tracked.view = Instance(
                address=beat.worker,
                key=(beat.worker.name, beat.worker.incarnation),
                role=tracked.role,
                kind=tracked.kind,
                beat=beat,
                last_seen_s=tracked.last_seen_s,
                kv_bytes_per_token=tracked.kv_bytes_per_token,
                groups=tracked.groups,
                capacity_tokens=min(beat.max_model_len, beat.capacity_tokens),
                stuck=tracked.stuck,
                refusing=tracked.refusing,
                waiting_tokens=load.waiting_tokens + _total(tracked.assigned, 1),
                sequences=load.running + load.waiting + sequences,
                assigned_sequences=sequences,
                assigned_context_tokens=_total(tracked.assigned, 3),
            )
        return tracked.view

    def _drop(self, name: str) -> InstanceKey:
        self._snapshot = None
        return name, self._tracked.pop(name).beat.worker.incarnation

    def _kind(self, heartbeat: Heartbeat) -> int:
        layout: KVLayout = heartbeat.layout
        return self._kinds.setdefault((heartbeat.fingerprint, layout.model, layout.shard), len(self._kinds))


def _busy(load: Load) -> bool:
    return load.running > 0 or load.waiting > 0


def _total(assigned: Iterable[tuple[float, int, int, int]], column: int) -> int:
    return sum(int(row[column]) for row in assigned)


def _role(name: str) -> Role:
    try:
        return Role(name)
    except ValueError as error:
        raise ProtocolError(f"Got a heartbeat with role {name!r} but expected one of {[role.value for role in Role]}") from error
