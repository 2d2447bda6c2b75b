"""Start a cluster, and end it: `Cluster` for programs, `serve` for the command line.

Order of a start: checks that cost nothing, Ray, placements of every pool, then gateway and instances side by side, and last
the gateway's own word that it can serve. Whatever fails, everything started is ended again.

Neighbours: `cluster.controller` keeps the cluster alive in between; `cluster.ray_session` is the connection to Ray.
"""

from __future__ import annotations

import json
import signal
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Self

from rich.console import Console

from cluster import preflight
from cluster.controller import Controller, Factories, MemberView, Surroundings
from cluster.progress import Progress, breakdown
from cluster.ray_session import RaySession, ray_address
from cluster.reconciler import RestartPolicy
from core.clock import Clock, MonotonicClock
from core.config import ClusterConfig
from core.errors import LaunchError
from instance.model_source import found_here, named_as_asked
from mail.keys import ClusterKeys

HEALTH_TIMEOUT_S = 30.0
HEALTH_POLL_S = 0.05
MOST_HEALTH_BYTES = 2000
REFRESH_S = 0.2


class Interrupted(LaunchError):
    """Asked to stop while still starting."""

    code = "interrupted"


class Cluster:
    """A gateway and its instances, alive between `start` and `stop`; also a context manager.

        with Cluster(config) as cluster:
            requests.post(f"{cluster.url}/v1/completions", ...)

    Attributes:
        seconds: what the launcher itself spent, by stage.
        total_s: from `start` until the gateway said that it can serve.
    """

    def __init__(
        self,
        config: ClusterConfig,
        *,
        address: str | None = None,
        python_path: Sequence[str] = (),
        factories: Factories | None = None,
        policy: RestartPolicy | None = None,
        console: Console | None = None,
        verbose: bool = False,
    ) -> None:
        """`address` is the Ray cluster to join; None takes RAY_ADDRESS, or else starts a local Ray. `python_path` goes before
        the sources' own folder on every actor's path. Without a `console` nothing is shown."""
        self._config = config
        self._address = address
        self._python_path = tuple(python_path)
        self._factories = factories
        self._policy = policy
        self._console = console or Console(quiet=True)
        self._verbose = verbose
        self._clock: Clock = MonotonicClock()
        self._session: RaySession | None = None
        self._controller: Controller | None = None
        self.seconds: dict[str, float] = {}
        self.total_s = 0.0

    def prepare(self) -> None:
        """What can fail, or take long, before Ray is there; `start` does it too. On this machine alone the model is found
        once, for all; on a cluster by every process, on its own machine.

        Raises:
            ModelError, PortInUse, LaunchError.
        """
        config = named_as_asked(self._config)
        preflight.check_port(config.gateway)
        if self._where is None:
            config = found_here(config, weights=preflight.runs_torch(config))
        preflight.check(config)
        self._config = config

    def start(self, cancel: threading.Event | None = None) -> Self:
        """Returns once the gateway can serve.

        Raises:
            ModelError, PortInUse, NoSuchAccelerator: at once, before or right after Ray is there.
            LaunchError: nobody can listen there, Ray is not reachable, or a member cannot be started.
            Interrupted: `cancel` was set meanwhile.
        """
        cancel = cancel or threading.Event()
        began_s = self._clock.now()
        self.prepare()
        try:
            with Progress(self._console) as progress:
                self._open(progress)
                self._await_members(progress, cancel)
                self._await_health(cancel)
        except BaseException:
            self.stop()
            raise
        self.total_s = self._clock.now() - began_s
        return self

    @property
    def url(self) -> str:
        """`http://host:port` of the gateway."""
        return self._running.url

    def instances(self) -> tuple[MemberView, ...]:
        """Every member, the gateway (named `gateway`) included, as it is now."""
        return self._running.members

    def kill_instance(self, name: str) -> None:
        """End a member's process, as a crash would; it is replaced. For tests and drills."""
        self._running.kill(name)

    def check(self) -> None:
        """Raises when the controller died, or while starting, when some member was given up."""
        self._running.check()

    def wait_changed(self, timeout_s: float) -> None:
        """Sleep until some member changes, or the time is up."""
        self._running.wait_changed(timeout_s)

    def stop(self, drain_timeout_s: float = 0.0, hurry: threading.Event | None = None) -> bool:
        """Let running requests end for up to `drain_timeout_s`, then end every member, and Ray if it was started here.

        Idempotent. Returns whether nothing was cut off. `hurry` cuts draining short.
        """
        drained = True
        controller, self._controller = self._controller, None
        session, self._session = self._session, None
        try:
            if controller is not None:
                drained = controller.stop(drain_timeout_s, hurry)
        finally:
            if session is not None:
                session.close()
        return drained

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _running(self) -> Controller:
        if self._controller is None:
            raise LaunchError("the cluster is not running")
        return self._controller

    @property
    def _where(self) -> str | None:
        return self._address or ray_address()

    def _open(self, progress: Progress) -> None:
        address = self._where
        progress.note("Starting Ray on this machine" if address is None else f"Connecting to Ray at {address}")
        session = self._session = RaySession.open(address, self._verbose)
        self.seconds = dict(session.seconds)
        from cluster.fleet import Fleet  # imports ray, whose environment the session has just settled

        fleet = Fleet(self._clock, self._python_path, silent_after_s=self._config.health.stuck_after_s)
        surroundings = Surroundings(session.nodes, session.driver_node_id)
        keys = ClusterKeys.generate()
        self._controller = Controller(self._config, keys, surroundings, fleet, self._clock, self._factories, self._policy)
        self._controller.start()

    def _await_members(self, progress: Progress, cancel: threading.Event) -> None:
        began_s = self._clock.now()
        controller = self._running
        while not controller.ready:
            if cancel.is_set():
                raise Interrupted("stopped while starting")
            controller.check()
            progress.show(controller.members, self._clock.now())
            controller.wait_changed(REFRESH_S)
        progress.show(controller.members, self._clock.now())
        self.seconds["members"] = self._clock.now() - began_s

    def _await_health(self, cancel: threading.Event) -> None:
        """Wait for the gateway to have heard from every instance, so that the first request finds them all. Raises LaunchError
        with its words if it never does."""
        began_s = self._clock.now()
        expected = Counter[str]()
        for pool in self._config.pools:
            expected[pool.role.value] += pool.replicas
        said = ""
        while self._clock.now() - began_s < HEALTH_TIMEOUT_S:
            if cancel.is_set():
                raise Interrupted("stopped while starting")
            healthy, said = _health(self.url)
            if healthy and expected <= _instances(said):
                self.seconds["first heartbeats"] = self._clock.now() - began_s
                return
            self._running.check()
            time.sleep(HEALTH_POLL_S)
        raise LaunchError(f"the gateway cannot serve after {HEALTH_TIMEOUT_S:g} s: {said}")


def serve(
    config: ClusterConfig,
    *,
    address: str | None = None,
    python_path: Sequence[str] = (),
    console: Console | None = None,
    factories: Factories | None = None,
    verbose: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT, then drain and end everything. A second signal ends it without draining.

    Call it from the main thread. Returns after a stop that was asked for.

    Raises:
        LaunchError, ModelError, ConfigError: the cluster could not be started, or its controller died. Members that were lost
            later, or whole nodes, end nothing: they are retried while the others serve.
    """
    console = console or Console()
    cluster = Cluster(config, address=address, python_path=python_path, factories=factories, console=console, verbose=verbose)
    cluster.prepare()  # a download is ended by the caller's own signal handlers
    with _signals() as (stop, hurry):
        try:
            cluster.start(stop)
        except Interrupted:
            console.print("Stopped while starting.")
            return
        console.print(breakdown(cluster.seconds, cluster.instances(), cluster.total_s))
        names = ", ".join(config.gateway.served_model_names) or config.model
        console.print(f"Serving [bold]{names}[/bold] at {cluster.url}", soft_wrap=True)
        try:
            while not stop.wait(REFRESH_S):
                cluster.check()
            console.print("Draining: running requests end, new ones are refused. Interrupt again to stop at once.")
            drained = cluster.stop(config.health.drain_timeout_s, hurry)
            console.print("Stopped." if drained else "Stopped; some requests were cut off.")
        finally:
            cluster.stop()


def _health(url: str) -> tuple[bool, str]:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2.0) as answer:
            return answer.status == 200, answer.read(MOST_HEALTH_BYTES).decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return False, error.read(MOST_HEALTH_BYTES).decode("utf-8", "replace")
    except OSError as error:
        return False, str(error)


def _instances(health: str) -> Counter[str]:
    """How many instances of each role the gateway hears, by its health report."""
    report = json.loads(health)
    return Counter({str(role): int(count) for role, count in report["instances"].items()})


@contextmanager
def _signals() -> Iterator[tuple[threading.Event, threading.Event]]:
    """Turn the first SIGTERM or SIGINT into one event and the second into another, and put things back afterwards."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    stop, hurry = threading.Event(), threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        (hurry if stop.is_set() else stop).set()

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop, hurry
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
