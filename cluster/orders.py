"""What the controller and the fleet say to each other: orders to make actors, and events about those made. Plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cluster.gateway_process import GatewayReport, GatewaySpec
from core.errors import HetServeError
from instance.spec import InstanceReport, InstanceSpec

Report = InstanceReport | GatewayReport


@dataclass(frozen=True)
class Order:
    """An actor to make. `factory` names what it holds (`module:attribute`), `options` are Ray's, `threads` go into its
    environment."""

    spec: InstanceSpec | GatewaySpec
    factory: str
    options: Mapping[str, Any]
    threads: int = 1

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def incarnation(self) -> int:
        return self.spec.incarnation


@dataclass(frozen=True)
class Ready:
    """It started."""

    name: str
    incarnation: int
    report: Report


@dataclass(frozen=True)
class Ended:
    """The process is gone. `hopeless`: what it raised while starting would be raised again. `error` is that, where typed."""

    name: str
    incarnation: int
    reason: str
    hopeless: bool = False
    error: HetServeError | None = None


@dataclass(frozen=True)
class Silent:
    """It has answered nothing for `for_s`."""

    name: str
    incarnation: int
    for_s: float


@dataclass(frozen=True)
class Pulse:
    """It answers. It last gave a sign of life `progress_age_s` ago: its loop came round, or a layer of its step ended."""

    name: str
    incarnation: int
    progress_age_s: float


Event = Ready | Ended | Silent | Pulse


class Actors(Protocol):
    """What the controller needs of a fleet: at most one live actor per name."""

    def spawn(self, order: Order) -> None:
        """Begin to make an actor and to start what it holds. Returns at once; `poll` tells how it went."""

    def poll(self, timeout_s: float) -> list[Event]:
        """What became known, waiting up to `timeout_s` for the first of it."""

    def tell(self, name: str, method: str, *arguments: object) -> None:
        """Begin a control call whose answer nobody needs."""

    def ask(self, name: str, method: str, *arguments: object, timeout_s: float) -> Any:
        """A control call with its answer; None when there is no such actor, or none that answers in time."""

    def kill(self, name: str) -> None:
        """End the process now. `poll` reports the end when it is certain."""

    def names(self) -> list[str]:
        """Those whose end was not reported yet."""
