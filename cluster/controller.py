"""Keeps the cluster as configured: starts the members, introduces them to each other, and replaces those that end.

One thread owns the reconciler and the fleet:

    reconciler.step ─▶ start, kill, give up ─▶ fleet.poll ─▶ ready, ended, silent, stuck ─▶ reconciler (again)

Everybody else sees a snapshot of the members, replaced whole. The gateway is a member like any other, under its own name;
when it comes back, on its old port, every instance is told its new address.

Neighbours: `cluster.placement` says where, `cluster.reconciler` says when, `cluster.fleet` does; `cluster.launch` owns this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

import structlog

from cluster.gateway_process import GatewayReport, GatewaySpec
from cluster.orders import Actors, Ended, Event, Order, Pulse, Ready, Silent
from cluster.placement import LOOPBACK, NODE_LABEL, Node, Placement, place
from cluster.reconciler import GiveUp, Kill, Phase, Reconciler, RestartPolicy, Slot, Start
from core.clock import Clock
from core.config import ClusterConfig
from core.errors import HetServeError, LaunchError
from core.messages import Address
from instance.spec import InstanceReport, InstanceSpec
from mail.keys import ClusterKeys

GATEWAY = "gateway"
POLL_S = 0.1
STOP_PATIENCE_S = 5.0
KILL_PATIENCE_S = 10.0

log = structlog.get_logger()


@dataclass(frozen=True)
class Factories:
    """Import paths (`module:attribute`) of what the two kinds of actor hold."""

    instance: str = "instance.instance:Instance"
    gateway: str = "cluster.gateway_process:GatewayProcess"


@dataclass(frozen=True)
class Surroundings:
    """What the controller knows of the cluster it places members in.

    Attributes:
        nodes: reads the live nodes.
        gateway_node: id of the node that the gateway stays on, where the user expects its port.
    """

    nodes: Callable[[], list[Node]]
    gateway_node: str


@dataclass(frozen=True)
class MemberView:
    """One member as it is now. `seconds` breaks its start-up down by stage, `process` being the wait for its process."""

    name: str
    role: str
    incarnation: int
    phase: Phase
    since_s: float
    node: str = ""
    accelerator: str = ""
    pid: int | None = None
    reason: str = ""
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass
class _Record:
    """What the latest incarnation of a member was made with and reported. `said` is why it last ended, as logged: a member
    that is retried for ever for one reason is worth one line."""

    role: str
    placement: Placement | None = None
    spawned_s: float = 0.0
    report: InstanceReport | GatewayReport | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    error: HetServeError | None = None
    said: str = ""


class Controller:
    """Runs from `start` until `stop`. Public methods may be called from any thread."""

    def __init__(
        self,
        config: ClusterConfig,
        keys: ClusterKeys,
        surroundings: Surroundings,
        fleet: Actors,
        clock: Clock,
        factories: Factories | None = None,
        policy: RestartPolicy | None = None,
    ) -> None:
        """Plan all placements. Raises NoSuchAccelerator when some pool has none."""
        self._config = config
        self._keys = keys
        self._surroundings = surroundings
        self._fleet = fleet
        self._clock = clock
        self._factories = factories or Factories()
        placements = place(config, surroundings.nodes())
        self._records = {GATEWAY: _Record(GATEWAY)}
        for name, placement in placements.items():
            self._records[name] = _Record(config.pools[placement.member.pool].role.value, placement)
        self._reconciler = Reconciler(self._records, policy)
        self._gateway: Address | None = None
        self._url: str | None = None
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._failure: Exception | None = None
        self._members: tuple[MemberView, ...] = ()
        self._publish()
        self._thread = threading.Thread(target=self._run, name="controller", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def members(self) -> tuple[MemberView, ...]:
        """The gateway and every instance."""
        return self._members

    @property
    def url(self) -> str:
        """Where the gateway listens, or will again when it is replaced. Raises LaunchError before it ever did."""
        if self._url is None:
            raise LaunchError("the gateway is not up")
        return self._url

    @property
    def ready(self) -> bool:
        return all(member.phase is Phase.READY for member in self._members)

    def wait_changed(self, timeout_s: float) -> None:
        """Sleep until some member changes its phase, or the time is up."""
        with self._changed:
            self._changed.wait(timeout_s)

    def check(self) -> None:
        """Raises LaunchError (or the typed error behind it) when a member that never was ready was given up, or when the
        controller itself died. A cluster that was ready once can only meet the latter."""
        if self._failure is not None:
            raise LaunchError(f"the controller died: {self._failure!r}") from self._failure
        for member in self._members:
            if member.phase is Phase.GIVEN_UP:
                error = self._records[member.name].error
                raise error if error is not None else LaunchError(f"{member.name} cannot be started: {member.reason}")

    def kill(self, name: str) -> None:
        """End a member's process, as a crash would. It is replaced. Raises KeyError for a name that does not exist."""
        if name not in self._records:
            raise KeyError(name)
        self._fleet.kill(name)

    def stop(self, drain_timeout_s: float = 0.0, hurry: threading.Event | None = None) -> bool:
        """Replace nobody any more, let running requests end, then end every member. Idempotent. A member that still starts has
        nothing to bring to an end, and would not hear of it while it loads: it is killed at once.

        Returns whether everything was drained in time. `hurry` cuts draining short.
        """
        self._stopping.set()
        if self._thread.ident is not None:
            self._thread.join()
        drained = drain_timeout_s <= 0 or self._drain(drain_timeout_s, hurry or threading.Event())
        for name in self._fleet.names():
            if self._reconciler.slots[name].phase is Phase.READY:
                self._fleet.tell(name, "stop")
            else:
                self._fleet.kill(name)
        self._await_ends(STOP_PATIENCE_S)
        for name in self._fleet.names():
            self._fleet.kill(name)
        self._await_ends(KILL_PATIENCE_S)
        return drained

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                self.turn()
        except Exception as error:  # the boundary of the controller: whoever waits for the cluster is told
            log.exception("controller died")
            self._failure = error
            with self._changed:
                self._changed.notify_all()

    def turn(self) -> None:
        """Decide, act, and take in what becomes known within a moment."""
        for action in self._reconciler.step(self._clock.now()):
            match action:
                case Start(name, incarnation):
                    self._spawn(name, incarnation)
                case Kill(name, _, reason):
                    log.warning("ending a member", name=name, reason=reason)
                    self._fleet.kill(name)
                case GiveUp(name, failures, reason):
                    log.error("gave up on a member", name=name, failures=failures, reason=reason)
        self._publish()
        wake_s = self._reconciler.wake_s(self._clock.now())
        wait_s = POLL_S if wake_s is None else min(POLL_S, wake_s)
        if not self._fleet.names():
            self._stopping.wait(wait_s)
            return
        for event in self._fleet.poll(wait_s):
            self._take_in(event)
        self._publish()

    def _spawn(self, name: str, incarnation: int) -> None:
        record = self._records[name]
        record.report, record.seconds, record.spawned_s = None, {}, self._clock.now()
        try:
            order = self._order(name, incarnation, record)
        except LaunchError as error:
            record.error = error
            self._log_end(name, incarnation, str(error))
            self._reconciler.ended(name, incarnation, str(error), self._clock.now())
            return
        self._fleet.spawn(order)

    def _order(self, name: str, incarnation: int, record: _Record) -> Order:
        if name == GATEWAY:
            return self._gateway_order(incarnation)
        assert record.placement is not None
        placement = record.placement = self._still(name, record.placement)
        spec = InstanceSpec(
            name=name,
            incarnation=incarnation,
            role=self._config.pools[placement.member.pool].role,
            accelerator=placement.accelerator,
            config=self._config,
            pool=placement.member.pool,
            keys=self._keys,
            gateways=() if self._gateway is None else (self._gateway,),
            threads=placement.threads,
            device=placement.device,
            node=placement.node,
            host=placement.host,
        )
        return Order(spec, self._factories.instance, placement.actor_options(), placement.threads)

    def _gateway_order(self, incarnation: int) -> Order:
        host = next(record.placement.host for record in self._records.values() if record.placement is not None)
        if host != LOOPBACK:
            host = next(
                (node.address for node in self._surroundings.nodes() if node.node_id == self._surroundings.gateway_node), host
            )
        spec = GatewaySpec(GATEWAY, incarnation, self._config, self._keys, host)
        options = {"num_cpus": 0, "label_selector": {NODE_LABEL: self._surroundings.gateway_node}}
        return Order(spec, self._factories.gateway, options)

    def _still(self, name: str, placement: Placement) -> Placement:
        """The same place again, or another one when its node is gone. Raises NoSuchAccelerator when there is none."""
        nodes = self._surroundings.nodes()
        if any(node.node_id == placement.node_id for node in nodes):
            return placement
        others = [
            record.placement
            for other, record in self._records.items()
            if record.placement is not None and other != name and self._reconciler.slots[other].live
        ]
        return place(self._config, nodes, [placement.member], others)[name]

    def _take_in(self, event: Event) -> None:
        now_s = self._clock.now()
        match event:
            case Ready(name, incarnation, report):
                if self._reconciler.ready(name, incarnation, now_s):
                    self._introduce(name, report, now_s)
            case Ended(name, incarnation, reason, hopeless, error):
                self._log_end(name, incarnation, reason)
                self._records[name].error = error
                if name != GATEWAY:  # the gateway need not wait for its heartbeats to run out
                    self._fleet.tell(GATEWAY, "lost", name, incarnation)
                self._reconciler.ended(name, incarnation, reason, now_s, hopeless)
            case Silent(name, incarnation, for_s):
                self._condemn(name, incarnation, f"no answer for {for_s:.1f} s")
            case Pulse(name, incarnation, progress_age_s) if progress_age_s >= self._config.health.stuck_after_s:
                self._condemn(name, incarnation, f"stuck: no sign of life for {progress_age_s:.1f} s")

    def _condemn(self, name: str, incarnation: int, reason: str) -> None:
        kill = self._reconciler.condemn(name, incarnation, reason)
        if kill is not None:
            log.warning("ending a member", name=name, reason=reason)
            self._fleet.kill(name)

    def _log_end(self, name: str, incarnation: int, reason: str) -> None:
        """Once per reason, until it is ready again."""
        record = self._records[name]
        if record.said != reason:
            log.warning("a member ended", name=name, incarnation=incarnation, reason=reason)
            record.said = reason

    def _introduce(self, name: str, report: InstanceReport | GatewayReport, now_s: float) -> None:
        """A member is up: note its report, and let instances and gateway know of each other."""
        record = self._records[name]
        record.report, record.error, record.said = report, None, ""
        process_s = now_s - record.spawned_s - sum(report.seconds.values())
        record.seconds = {"process": max(0.0, process_s), **report.seconds}
        if isinstance(report, GatewayReport):
            self._gateway, self._url = report.address, report.url
            self._keep_port(report.url)
            introduced = [n for n, slot in self._reconciler.slots.items() if n != GATEWAY and slot.phase is Phase.READY]
        else:
            introduced = [name]
        if self._gateway is not None:
            for instance in introduced:
                self._fleet.tell(instance, "connect", (self._gateway,))

    def _keep_port(self, url: str) -> None:
        """A gateway that is replaced comes back where its clients know it, even if the port was the system's choice."""
        port = urlsplit(url).port
        if port is not None and port != self._config.gateway.port:
            gateway = self._config.gateway.model_copy(update={"port": port})
            self._config = self._config.model_copy(update={"gateway": gateway})

    # --- ending -------------------------------------------------------------------------------------------------------

    def _drain(self, timeout_s: float, hurry: threading.Event) -> bool:
        """The gateway refuses new requests and ends those it has; workers then have nothing left."""
        verdict: list[bool] = []

        def drain() -> None:
            verdict.append(bool(self._fleet.ask(GATEWAY, "drain", timeout_s, timeout_s=timeout_s + STOP_PATIENCE_S)))

        asking = threading.Thread(target=drain, name="drain", daemon=True)
        asking.start()
        while asking.is_alive() and not hurry.is_set():
            asking.join(POLL_S)
        return verdict == [True]

    def _await_ends(self, patience_s: float) -> None:
        until_s = self._clock.now() + patience_s
        while self._fleet.names() and self._clock.now() < until_s:
            self._fleet.poll(POLL_S)

    # --- the snapshot -------------------------------------------------------------------------------------------------

    def _publish(self) -> None:
        members = tuple(self._view(slot) for slot in self._reconciler.slots.values())
        if members != self._members:
            self._members = members
            with self._changed:
                self._changed.notify_all()

    def _view(self, slot: Slot) -> MemberView:
        record = self._records[slot.name]
        placement = record.placement
        return MemberView(
            name=slot.name,
            role=record.role,
            incarnation=slot.incarnation,
            phase=slot.phase,
            since_s=slot.since_s,
            node=placement.node if placement else "",
            accelerator=placement.accelerator if placement else "",
            pid=record.report.pid if record.report and slot.phase is Phase.READY else None,
            reason=slot.reason,
            seconds=dict(record.seconds),
        )
