"""The Ray actors: a process around an instance, and a process around the gateway. Nothing of theirs is on a request's path.

Each class of calls has threads of its own, so that a question about health is never queued behind a model that loads or
behind `wait`, which lasts as long as the actor does its work:

    life      start, wait
    control   ping, connect, set_role, lost, drain, undrain, stop, invariants

Actors never restart by themselves (`max_restarts=0`): the controller replaces them, with a higher incarnation.
What an actor holds is named by an import path (`module:attribute`), so that importing it happens, and is timed, in the actor.

Neighbours: `cluster.fleet` makes and calls them; `instance.instance` and `cluster.gateway_process` are what they hold.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import ray

from cluster.gateway_process import GatewayReport, GatewaySpec
from core.config import Role
from core.errors import ConfigError
from core.messages import Address
from instance.spec import InstanceReport, InstanceSpec

Method = TypeVar("Method", bound=Callable[..., Any])
GROUPS = {"life": 2, "control": 4}


class Held(Protocol):
    """What both kinds of actor hold: `instance.instance.Instance` or `cluster.gateway_process.GatewayProcess`.

    All methods may be called from any thread; `wait` returns once stopped and raises when what it waits for died.
    """

    def start(self) -> InstanceReport | GatewayReport: ...

    def wait(self) -> None: ...

    def connect(self, gateways: Iterable[Address]) -> None: ...

    def drain(self, timeout_s: float) -> bool: ...

    def stop(self) -> None: ...

    def invariants(self) -> list[str]: ...

    @property
    def progress_age_s(self) -> float | None: ...


def resolve(path: str) -> Callable[[InstanceSpec | GatewaySpec], Held]:
    """The factory that `module:attribute` names. Raises ConfigError when there is none."""
    module, _, attribute = path.partition(":")
    try:
        factory: Callable[[InstanceSpec | GatewaySpec], Held] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot import {path}: {error}") from error
    return factory


def _group(name: str) -> Callable[[Method], Method]:
    def assign(method: Method) -> Method:
        grouped: Method = ray.method(concurrency_group=name)(method)
        return grouped

    return assign


class _Holder:
    """The calls that both kinds of actor answer, passed on to what they hold."""

    def __init__(self, factory: str, spec: InstanceSpec | GatewaySpec) -> None:
        self._factory = factory
        self._spec = spec
        self._held: Held | None = None
        self._is_started = False

    @_group("life")
    def start(self) -> InstanceReport | GatewayReport:
        """Import, build and start. The report's `seconds` gain `imports`, and `other` for what no stage accounts for."""
        began_s = time.perf_counter()
        self._held = resolve(self._factory)(self._spec)
        import_s = time.perf_counter() - began_s
        report = self._held.start()
        self._is_started = True
        other_s = time.perf_counter() - began_s - import_s - sum(report.seconds.values())
        return replace(report, seconds={"imports": import_s, **report.seconds, "other": max(0.0, other_s)})

    @_group("life")
    def wait(self) -> None:
        self._started().wait()

    @_group("control")
    def ping(self) -> float | None:
        """An answer at all is proof that the process is scheduled and that its interpreter turns; what it says, how long ago
        the work inside went on, where there is any to speak of."""
        return None if self._held is None else self._held.progress_age_s

    @_group("control")
    def connect(self, gateways: tuple[Address, ...]) -> None:
        self._started().connect(gateways)

    @_group("control")
    def drain(self, timeout_s: float) -> bool:
        return self._started().drain(timeout_s)

    @_group("control")
    def stop(self) -> None:
        """Nothing, while it still starts: whoever wants that to end has to end the process."""
        if self._held is not None and self._is_started:
            self._held.stop()

    @_group("control")
    def invariants(self) -> list[str]:
        return self._started().invariants()

    def _started(self) -> Held:
        if self._held is None:
            raise RuntimeError("Got a call before start() returned")
        return self._held


class _Engine(_Holder):
    """Holds an `Instance`."""

    @_group("control")
    def set_role(self, role: str) -> None:
        held: Any = self._started()
        held.set_role(Role(role))

    @_group("control")
    def undrain(self) -> None:
        held: Any = self._started()
        held.undrain()


class _Gateway(_Holder):
    """Holds a `GatewayProcess`."""

    @_group("control")
    def lost(self, name: str, incarnation: int) -> None:
        held: Any = self._started()
        held.lost(name, incarnation)


def _actor(holder: type[_Holder], name: str) -> Any:
    holder.__name__ = holder.__qualname__ = name  # what process lists and `ray list actors` show
    return ray.remote(max_restarts=0, max_task_retries=0, concurrency_groups=GROUPS)(holder)


EngineActor = _actor(_Engine, "EngineActor")
GatewayActor = _actor(_Gateway, "GatewayActor")
