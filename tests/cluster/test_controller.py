from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.controller import GATEWAY, Controller, Surroundings
from cluster.gateway_process import GatewayReport, GatewaySpec
from cluster.orders import Ended, Event, Order, Pulse, Ready, Silent
from cluster.placement import ACCELERATOR_LABEL, NODE_LABEL, Node
from cluster.reconciler import Phase, RestartPolicy
from core.clock import ManualClock
from core.config import ClusterConfig
from core.errors import LaunchError, ModelError, NoSuchAccelerator
from core.messages import Address
from instance.spec import InstanceReport, InstanceSpec
from mail.keys import ClusterKeys

Configure = Callable[..., ClusterConfig]
KEYS = ClusterKeys("public", "secret")


def machine(name: str, address: str = "10.0.0.1", cpus: float = 4) -> Node:
    return Node(f"id-{name}", name, address, {NODE_LABEL: f"id-{name}"}, {"CPU": cpus}, {"CPU": cpus})


class FakeFleet:
    """Remembers what it was told; `events` are what the next polls report."""

    def __init__(self) -> None:
        self.orders: list[Order] = []
        self.live: dict[str, Order] = {}
        self.told: list[tuple[Any, ...]] = []
        self.killed: list[str] = []
        self.events: list[Event] = []
        self.drained: threading.Event | None = None
        self.stubborn = False

    def spawn(self, order: Order) -> None:
        assert order.name not in self.live, "two processes of one member"
        self.orders.append(order)
        self.live[order.name] = order

    def poll(self, timeout_s: float) -> list[Event]:
        events, self.events = self.events, []
        for event in events:
            if isinstance(event, Ended):
                self.live.pop(event.name, None)
        return events

    def tell(self, name: str, method: str, *arguments: object) -> None:
        self.told.append((name, method, *arguments))
        if method == "stop" and not self.stubborn:
            self.end(name, "it stopped")

    def ask(self, name: str, method: str, *arguments: object, timeout_s: float) -> Any:
        self.told.append((name, method, *arguments))
        return True if self.drained is None else self.drained.wait(20)

    def kill(self, name: str) -> None:
        self.killed.append(name)
        self.end(name, "killed")

    def names(self) -> list[str]:
        return list(self.live)

    # what really happened

    def ready(self, name: str, port: int = 8000) -> None:
        order = self.live[name]
        address = Address(name, order.incarnation, f"tcp://{name}:{order.incarnation}")
        if name == GATEWAY:
            self.events.append(
                Ready(name, order.incarnation, GatewayReport(address, f"http://127.0.0.1:{port}", 1, {"open": 0.5}))
            )
        else:
            self.events.append(Ready(name, order.incarnation, InstanceReport(address, "kv:1", 10, 2, {"load": 1.5})))

    def end(self, name: str, reason: str, **more: Any) -> None:
        self.events.append(Ended(name, self.live[name].incarnation, reason, **more))

    def incarnations(self, name: str) -> list[int]:
        return [order.incarnation for order in self.orders if order.name == name]


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def fleet() -> FakeFleet:
    return FakeFleet()


@pytest.fixture
def nodes() -> list[Node]:
    return [machine("one")]


@pytest.fixture
def config(configure: Configure) -> ClusterConfig:
    return configure({"role": "prefill"}, {"role": "decode"})


@pytest.fixture
def controller(config: ClusterConfig, fleet: FakeFleet, clock: ManualClock, nodes: list[Node]) -> Controller:
    surroundings = Surroundings(lambda: list(nodes), "id-one")
    return Controller(config, KEYS, surroundings, fleet, clock, policy=RestartPolicy(max_failed_starts=2))


def bring_up(controller: Controller, fleet: FakeFleet, port: int = 8000) -> None:
    controller.turn()
    for name in list(fleet.live):
        fleet.ready(name, port)
    controller.turn()


def test_gateway_and_instances_start_side_by_side(controller: Controller, fleet: FakeFleet) -> None:
    controller.turn()
    assert [(order.name, order.incarnation) for order in fleet.orders] == [(GATEWAY, 1), ("prefill-0", 1), ("decode-0", 1)]
    gateway, prefill, _ = fleet.orders
    assert isinstance(gateway.spec, GatewaySpec)
    assert gateway.options["label_selector"] == {NODE_LABEL: "id-one"}
    assert isinstance(prefill.spec, InstanceSpec)
    assert (prefill.spec.node, prefill.spec.threads, prefill.spec.host) == ("one", 2, "127.0.0.1")
    assert not controller.ready


def test_whoever_comes_up_last_is_introduced(controller: Controller, fleet: FakeFleet) -> None:
    controller.turn()
    fleet.ready("prefill-0")
    controller.turn()
    assert fleet.told == [], "there is no gateway to introduce it to yet"
    fleet.ready(GATEWAY)
    controller.turn()
    fleet.ready("decode-0")
    controller.turn()
    gateway = Address(GATEWAY, 1, "tcp://gateway:1")
    assert fleet.told == [("prefill-0", "connect", (gateway,)), ("decode-0", "connect", (gateway,))]
    assert controller.ready
    assert controller.url == "http://127.0.0.1:8000"


def test_start_up_time_that_no_stage_explains_is_the_wait_for_the_process(
    controller: Controller, fleet: FakeFleet, clock: ManualClock
) -> None:
    controller.turn()
    clock.advance(4.0)
    fleet.ready("decode-0")
    controller.turn()
    decode = next(member for member in controller.members if member.name == "decode-0")
    assert decode.seconds == {"process": 2.5, "load": 1.5}


def test_a_dead_instance_is_replaced_and_told_of_the_gateway(controller: Controller, fleet: FakeFleet) -> None:
    bring_up(controller, fleet)
    fleet.told.clear()
    fleet.end("decode-0", "killed")
    controller.turn()
    assert not controller.ready
    assert fleet.told == [(GATEWAY, "lost", "decode-0", 1)], "the gateway must not have to wait for heartbeats to run out"
    controller.turn()
    assert fleet.incarnations("decode-0") == [1, 2]
    replacement = fleet.orders[-1].spec
    assert isinstance(replacement, InstanceSpec)
    assert replacement.gateways == (Address(GATEWAY, 1, "tcp://gateway:1"),)
    fleet.ready("decode-0")
    controller.turn()
    assert ("decode-0", "connect", replacement.gateways) in fleet.told
    assert controller.ready


def test_a_dead_gateway_comes_back_on_its_port_and_every_instance_hears_of_it(controller: Controller, fleet: FakeFleet) -> None:
    bring_up(controller, fleet, port=4321)
    fleet.told.clear()
    fleet.end(GATEWAY, "killed")
    controller.turn()
    assert controller.url == "http://127.0.0.1:4321", "clients may ask while it is away"
    controller.turn()
    spec = fleet.orders[-1].spec
    assert isinstance(spec, GatewaySpec)
    assert (spec.incarnation, spec.config.gateway.port) == (2, 4321)
    fleet.ready(GATEWAY, 4321)
    controller.turn()
    heard = Address(GATEWAY, 2, "tcp://gateway:2")
    assert sorted(fleet.told) == [("decode-0", "connect", (heard,)), ("prefill-0", "connect", (heard,))]


def test_a_member_whose_node_is_gone_moves_to_another(controller: Controller, fleet: FakeFleet, nodes: list[Node]) -> None:
    bring_up(controller, fleet)
    nodes[:] = [machine("two", "10.0.0.2", cpus=8)]
    fleet.end("decode-0", "node died")
    controller.turn()
    controller.turn()
    moved = fleet.orders[-1].spec
    assert isinstance(moved, InstanceSpec)
    assert (moved.node, moved.incarnation) == ("two", 2)


def test_a_member_with_nowhere_to_go_waits_and_is_placed_when_there_is_somewhere(
    controller: Controller, fleet: FakeFleet, nodes: list[Node], clock: ManualClock
) -> None:
    bring_up(controller, fleet)
    nodes.clear()
    fleet.end("decode-0", "node died")
    controller.turn()
    controller.turn()
    assert fleet.incarnations("decode-0") == [1]
    nodes.append(machine("three"))
    clock.advance(1.0)
    controller.turn()
    assert fleet.incarnations("decode-0")[-1] > 1


def test_a_lost_node_ends_nobody_else_and_its_members_come_back_with_it(
    configure: Configure, fleet: FakeFleet, clock: ManualClock, capfd: pytest.CaptureFixture[str]
) -> None:
    def labelled(name: str, accelerator: str) -> Node:
        return replace(machine(name), labels={NODE_LABEL: f"id-{name}", ACCELERATOR_LABEL: accelerator})

    one, two = labelled("one", "L40S"), labelled("two", "H100")
    nodes = [one, two]
    config = configure({"role": "prefill", "accelerator": "H100"}, {"role": "decode", "accelerator": "L40S"})
    controller = Controller(config, KEYS, Surroundings(lambda: list(nodes), "id-one"), fleet, clock)
    bring_up(controller, fleet)
    nodes.remove(two)
    fleet.end("prefill-0", "node died")
    for _ in range(200):
        controller.turn()
        controller.check()
        clock.advance(10.0)
    phases = {member.name: member.phase for member in controller.members}
    assert phases == {GATEWAY: Phase.READY, "decode-0": Phase.READY, "prefill-0": Phase.ABSENT}
    assert (fleet.incarnations("decode-0"), fleet.killed) == ([1], [])
    said = capfd.readouterr().out
    assert said.count("node died") == 1
    assert said.count("asked for accelerator H100") == 1, "one line per change, not per attempt"
    nodes.append(two)
    clock.advance(30.0)
    controller.turn()
    fleet.ready("prefill-0")
    controller.turn()
    assert controller.ready


def test_a_silent_member_is_killed_and_replaced_only_once_it_is_gone(controller: Controller, fleet: FakeFleet) -> None:
    bring_up(controller, fleet)
    fleet.events = [Silent("decode-0", 1, 31.0), Silent("decode-0", 1, 31.1)]
    controller.turn()
    assert fleet.killed == ["decode-0"]
    assert fleet.incarnations("decode-0") == [1]
    controller.turn()
    controller.turn()
    assert fleet.incarnations("decode-0") == [1, 2]


def test_a_stuck_instance_is_killed_and_replaced_and_one_in_a_long_step_is_not(
    controller: Controller, fleet: FakeFleet, config: ClusterConfig
) -> None:
    bring_up(controller, fleet)
    stuck_after_s = config.health.stuck_after_s
    fleet.events = [Pulse("prefill-0", 1, stuck_after_s - 0.1), Pulse("decode-0", 1, 0.05)]
    controller.turn()
    assert fleet.killed == []
    fleet.events = [Pulse("decode-0", 1, stuck_after_s), Pulse("decode-0", 1, stuck_after_s + 1), Pulse("prefill-0", 1, 0.0)]
    controller.turn()
    assert fleet.killed == ["decode-0"]
    controller.turn()
    controller.turn()
    assert fleet.incarnations("decode-0") == [1, 2]
    fleet.events = [Pulse("decode-0", 1, 99.0)]
    controller.turn()
    assert fleet.killed == ["decode-0"], "the last word of the dead says nothing of the living"
    decode = next(member for member in controller.members if member.name == "decode-0")
    assert decode.reason.startswith("stuck: no sign of life")


def test_what_cannot_be_started_is_reported_with_its_own_error(controller: Controller, fleet: FakeFleet) -> None:
    controller.turn()
    error = ModelError("no such layer")
    fleet.end("prefill-0", "no such layer", hopeless=True, error=error)
    controller.turn()
    controller.turn()
    with pytest.raises(ModelError, match="no such layer"):
        controller.check()
    assert next(member for member in controller.members if member.name == "prefill-0").phase is Phase.GIVEN_UP


def test_starts_that_keep_dying_are_given_up_by_name(controller: Controller, fleet: FakeFleet, clock: ManualClock) -> None:
    for _ in range(2):
        controller.turn()
        fleet.end("prefill-0", "out of memory")
        controller.turn()
        clock.advance(60.0)
    controller.turn()
    with pytest.raises(LaunchError, match="prefill-0 cannot be started: out of memory"):
        controller.check()


def test_no_accelerator_is_known_before_anything_is_spawned(configure: Configure, fleet: FakeFleet, clock: ManualClock) -> None:
    config = configure({"role": "mixed", "accelerator": "H100"})
    with pytest.raises(NoSuchAccelerator):
        Controller(config, KEYS, Surroundings(lambda: [machine("one")], "id-one"), fleet, clock)
    assert fleet.orders == []


def test_stop_drains_the_gateway_then_ends_everybody_and_replaces_nobody(controller: Controller, fleet: FakeFleet) -> None:
    bring_up(controller, fleet)
    fleet.told.clear()
    assert controller.stop(drain_timeout_s=7.0)
    assert fleet.told == [(GATEWAY, "drain", 7.0), (GATEWAY, "stop"), ("prefill-0", "stop"), ("decode-0", "stop")]
    assert fleet.live == {}
    assert fleet.killed == []
    assert len(fleet.orders) == 3


def test_a_hurried_stop_does_not_wait_for_the_drain(controller: Controller, fleet: FakeFleet) -> None:
    bring_up(controller, fleet)
    fleet.drained = threading.Event()
    hurry = threading.Event()
    hurry.set()
    assert not controller.stop(drain_timeout_s=600.0, hurry=hurry)
    assert fleet.live == {}
    fleet.drained.set()


def test_members_that_do_not_stop_when_told_are_killed(configure: Configure, fleet: FakeFleet, nodes: list[Node]) -> None:
    class Hurrying(ManualClock):
        def now(self) -> float:
            self.advance(1.0)
            return super().now()

    controller = Controller(configure({"role": "mixed"}), KEYS, Surroundings(lambda: nodes, "id-one"), fleet, Hurrying())
    bring_up(controller, fleet)
    fleet.stubborn = True
    controller.stop()
    assert sorted(fleet.killed) == [GATEWAY, "mixed-0"]
    assert fleet.live == {}


def test_a_member_that_still_starts_is_killed_at_once_by_a_stop(controller: Controller, fleet: FakeFleet) -> None:
    bring_up(controller, fleet)
    fleet.end("decode-0", "killed")
    while len(fleet.incarnations("decode-0")) < 2:
        controller.turn()
    fleet.told.clear()
    controller.stop()
    assert (GATEWAY, "stop") in fleet.told
    assert ("prefill-0", "stop") in fleet.told
    assert ("decode-0", "stop") not in fleet.told
    assert fleet.killed == ["decode-0"]
    assert fleet.live == {}


def test_a_controller_that_dies_says_so(controller: Controller, fleet: FakeFleet) -> None:
    def broken(timeout_s: float) -> list[Event]:
        raise RuntimeError("ray is gone")

    fleet.poll = broken
    controller.start()
    controller._thread.join(timeout=10)
    with pytest.raises(LaunchError, match="ray is gone"):
        controller.check()
