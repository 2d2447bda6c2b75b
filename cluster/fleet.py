"""The live actors of one cluster: makes them, calls them, and reports what becomes of them.

Each actor has one call outstanding that tells its fate: `start` until that returns, then `wait`. When it resolves, the actor
is ready, or ended. An end is reported once Ray has declared the actor dead. The process is gone by then, but for one that is
stopped (SIGSTOP): Ray kills it a moment later (`kill_worker_timeout_milliseconds`), and its incarnation fences it until then.
Beside that, actors are pinged: a process that is there and answers nothing (stopped, swapped out, its node unreachable) is
reported as silent. What the others answer, how long ago their last sign of life was, is reported as their pulse. Silence counts
only while somebody listens: a controller that was itself stopped for a while has not been left unanswered for so long.

Owned by one thread at a time; `kill` alone may be called from any. Neighbour: `cluster.controller` drives it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, GetTimeoutError, RayError, RayTaskError

from cluster.actors import EngineActor, GatewayActor
from cluster.gateway_process import GatewaySpec
from cluster.orders import Ended, Event, Order, Pulse, Ready, Silent
from core.clock import Clock
from core.errors import HetServeError
from instance.model_source import is_hub_id

APP_ROOT = Path(__file__).resolve().parents[1]


@dataclass(eq=False)
class _Live:
    """One actor. `fate` is the outstanding `start` or `wait`; `verdict` what to report when a kill is confirmed."""

    order: Order
    handle: Any
    fate: Any
    ready: bool = False
    verdict: Ended | None = None
    ping: Any = None
    pinged_s: float = 0.0
    silent_s: float = 0.0


def environment(threads: int, python_path: tuple[str, ...], model: str) -> dict[str, str]:
    """Variables of an actor's process: where the sources are, how many threads to compute with, and no network look-ups
    but for a model that it has to find on its own machine."""
    offline = {} if is_hub_id(model) else {"HF_HUB_OFFLINE": "1"}
    return offline | {
        "PYTHONPATH": os.pathsep.join([*python_path, str(APP_ROOT)]),
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "OPENBLAS_NUM_THREADS": str(threads),
        # OpenMP threads that spin for long starve whoever shares their cores; ones that sleep at once are slow to wake.
        "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "2000"),
        "TOKENIZERS_PARALLELISM": "false",
    }


class Fleet:
    """The actors of one cluster, at most one per name."""

    def __init__(
        self, clock: Clock, python_path: tuple[str, ...] = (), ping_period_s: float = 0.5, silent_after_s: float = 3.0
    ) -> None:
        self._clock = clock
        self._python_path = python_path
        self._ping_period_s = ping_period_s
        self._silent_after_s = silent_after_s
        self._live: dict[str, _Live] = {}
        self._listened_s = clock.now()

    def spawn(self, order: Order) -> None:
        """Begin to make an actor and to start what it holds. Returns at once; `poll` tells how it went."""
        actor = GatewayActor if isinstance(order.spec, GatewaySpec) else EngineActor
        variables = environment(order.threads, self._python_path, order.spec.config.model)
        handle = actor.options(runtime_env={"env_vars": variables}, **order.options).remote(order.factory, order.spec)
        self._live[order.name] = _Live(order, handle, handle.start.remote(), pinged_s=self._clock.now())

    def poll(self, timeout_s: float) -> list[Event]:
        """What became known, waiting up to `timeout_s` for the first of it."""
        fates = {live.fate: live for live in self._live.values()}
        if not fates:
            return []
        done, _ = ray.wait(list(fates), num_returns=1, timeout=timeout_s)
        if done:
            done, _ = ray.wait(list(fates), num_returns=len(fates), timeout=0)
        events = [event for ref in done if (event := self._settle(fates[ref], ref)) is not None]
        return events + self._listen()

    def tell(self, name: str, method: str, *arguments: object) -> None:
        """Begin a control call whose answer nobody needs."""
        live = self._live.get(name)
        if live is not None:
            getattr(live.handle, method).remote(*arguments)

    def ask(self, name: str, method: str, *arguments: object, timeout_s: float) -> Any:
        """A control call with its answer; None when there is no such actor, or none that answers in time."""
        live = self._live.get(name)
        if live is None:
            return None
        try:
            return ray.get(getattr(live.handle, method).remote(*arguments), timeout=timeout_s)
        except (GetTimeoutError, RayError):
            return None

    def kill(self, name: str) -> None:
        """End the process now. `poll` reports the end when it is certain."""
        live = self._live.get(name)
        if live is not None:
            ray.kill(live.handle, no_restart=True)

    def names(self) -> list[str]:
        """Those whose end was not reported yet."""
        return list(self._live)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _settle(self, live: _Live, reference: Any) -> Event | None:
        """The outstanding call of an actor resolved: is it ready, gone, or to be killed first?"""
        order = live.order
        try:
            result = ray.get(reference)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, HetServeError) else None
            said = f"{type(error.cause).__name__}: {error.cause}" if cause is None else str(cause)
            hopeless = not live.ready and not (cause is not None and cause.retryable)
            return self._condemn(live, Ended(order.name, order.incarnation, said, hopeless, cause))
        except ActorUnavailableError as error:
            return self._condemn(live, Ended(order.name, order.incarnation, _first_line(error)))
        except RayError as error:
            del self._live[order.name]
            return live.verdict or Ended(order.name, order.incarnation, _first_line(error))
        if live.verdict is not None or live.ready:
            return self._condemn(live, live.verdict or Ended(order.name, order.incarnation, "it stopped"))
        live.ready, live.fate = True, live.handle.wait.remote()
        return Ready(order.name, order.incarnation, result)

    def _condemn(self, live: _Live, verdict: Ended) -> Event | None:
        """Its work is over but its process is there: end that, and report `verdict` when it is gone, not yet."""
        live.verdict = live.verdict or verdict
        ray.kill(live.handle, no_restart=True)
        live.fate = live.handle.ping.remote()
        return None

    def _listen(self) -> list[Event]:
        """Collect the answers to pings and send new ones."""
        now_s = self._clock.now()
        listened_s = min(now_s - self._listened_s, self._ping_period_s)
        self._listened_s = now_s
        events: list[Event] = []
        pings = {live.ping: live for live in self._live.values() if live.ping is not None}
        if pings:
            answered, _ = ray.wait(list(pings), num_returns=len(pings), timeout=0)
            for reference in answered:
                pings[reference].ping, pings[reference].silent_s = None, 0.0
                events += _pulse(pings[reference].order, reference)
        for live in self._live.values():
            if not live.ready:
                continue
            if live.ping is not None:
                live.silent_s += listened_s
                if live.silent_s >= self._silent_after_s:
                    events.append(Silent(live.order.name, live.order.incarnation, live.silent_s))
            elif now_s - live.pinged_s >= self._ping_period_s:
                live.ping, live.pinged_s = live.handle.ping.remote(), now_s
        return events


def _pulse(order: Order, reference: Any) -> list[Event]:
    try:
        age_s = ray.get(reference)
    except RayError:  # it ended: its fate tells
        return []
    return [] if age_s is None else [Pulse(order.name, order.incarnation, age_s)]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
