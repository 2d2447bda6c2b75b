"""A whole gateway in one object: mailbox, pump, dispatcher, HTTP server, on a thread with an event loop of its own.

The caller's thread may be any but the gateway's own, and may itself run an event loop (a Ray actor's does, but `drain`
and `stop` block: call them in a worker thread there). `start` returns once the port is bound and answers; everything that
can go wrong until then is raised from it, typed.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Coroutine
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog
import uvloop

from core.clock import MonotonicClock
from core.config import ClusterConfig, RouterConfig
from core.errors import LaunchError, Unavailable
from core.messages import Address
from gateway.http.connection import ConnectionLimits
from gateway.http.server import HttpServer
from gateway.routes.app import create_app
from gateway.routes.generating import GeneratingRoutes
from gateway.routes.status import StatusRoutes
from gateway.serving.awaited import AwaitedAttempts
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.intake import Intake, ModelInfo
from gateway.serving.journal import Journal
from gateway.serving.lifecycle import LifeCycle, Limits
from gateway.serving.metrics import Metrics
from gateway.serving.pump import Pump
from gateway.serving.sampling_defaults import SamplingDefaults, sampling_defaults
from gateway.text.codec import TextCodec
from gateway.text.tokenizing import Tokenizing
from mail.door import Door
from mail.keys import ClusterKeys
from mail.mailbox import Mailbox
from mail.peers import MessageSender, Peers
from router.admission import Admission
from router.least_ttft import LeastTTFT
from router.policy import RoutingPolicy
from router.round_robin import RoundRobin
from router.state import ClusterState, InstanceKey, Snapshot

log = structlog.get_logger()
T = TypeVar("T")

SWEEPS_PER_SILENCE = 10


def make_policy(router: RouterConfig, max_waiting_tokens: int) -> RoutingPolicy:
    """The configured policy."""
    admission = Admission(max_waiting_tokens)
    if router.policy == "round-robin":
        return RoundRobin(admission, router.local_prefill_tokens)
    return LeastTTFT(admission, router.local_prefill_tokens)


class Gateway:
    """One gateway process's HTTP door.

    Args:
        config: the cluster's; only the parts about the gateway, the router, health and names are read.
        keys: the cluster's secret.
        model_path: local folder with the model's tokenizer and `config.json`.
        name, incarnation: this gateway's identity on the data plane.
        mailbox_host: address of this machine that workers can reach; None takes the transfer's.
        make_peers: what its threads send with; each makes its own.
        on_ready: called with this service, in the loop's thread, once the port answers.
    """

    def __init__(
        self,
        config: ClusterConfig,
        keys: ClusterKeys,
        model_path: str | Path,
        *,
        name: str = "gateway-0",
        incarnation: int = 1,
        on_ready: Callable[[Gateway], None] | None = None,
        policy: RoutingPolicy | None = None,
        mailbox_host: str | None = None,
        make_peers: Callable[[Door], MessageSender] = Peers,
    ) -> None:
        self._config = config
        self._keys = keys
        self._model_path = Path(model_path)
        self._name = name
        self._incarnation = incarnation
        self._on_ready = on_ready
        self._mailbox_host = mailbox_host or config.transfer.host or "127.0.0.1"
        self._make_peers = make_peers
        self._policy = policy or make_policy(config.router, config.engine.max_waiting_tokens)
        self._clock = MonotonicClock()
        self._started = threading.Event()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: HttpServer | None = None
        self._dispatcher: Dispatcher | None = None
        self._address: Address | None = None

    @property
    def address(self) -> Address:
        """Where workers send tokens and heartbeats. Known once started."""
        if self._address is None:
            raise LaunchError("the gateway has not started")
        return self._address

    @property
    def url(self) -> str:
        if self._server is None:
            raise LaunchError("the gateway has not started")
        return self._server.url

    def start(self) -> None:
        """Bind, serve, and return.

        Raises:
            PortInUse, LaunchError: the HTTP port or the mailbox cannot be had.
            ModelError: the folder has no tokenizer.
        """
        self._thread = threading.Thread(target=self._run, name="gateway-http", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests with 503, and wait until those under way are answered, to the last byte that a slow client takes;
        False if some were left after `timeout_s`."""
        return self._call(self._drain(timeout_s))

    def wait(self) -> None:
        """Block until the gateway has ended.

        Raises:
            LaunchError: it was never started.
            Exception: whatever ended it, if nobody asked it to stop.
        """
        if self._thread is None:
            raise LaunchError("the gateway has not started")
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End everything at once: requests under way get an error. Idempotent."""
        if self._server is not None and self._thread is not None and self._thread.is_alive():
            if self._loop is not None and self._dispatcher is not None:
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(self._dispatcher.close_all, Unavailable("the gateway is shutting down"))
            self._server.stop()
            self._thread.join()

    def snapshot(self) -> Snapshot:
        """The instances that the gateway believes in. Safe from any thread."""
        return self._call(self._snapshot())

    def invariants(self) -> list[str]:
        """What is still held or does not add up, in words; empty at rest. Safe from any other thread."""
        return self._call(self._leftovers())

    async def _leftovers(self) -> list[str]:
        assert self._dispatcher is not None
        counts = self._dispatcher.invariants()
        ended = {name: counts.pop(name) for name in ("accepted", "completed", "failed", "cancelled")}
        left = [f"{name}: {count}" for name, count in counts.items() if count]
        if ended["accepted"] != ended["completed"] + ended["failed"] + ended["cancelled"] + counts["in_flight"]:
            left.append(f"accepted requests do not add up: {ended}")
        return left

    async def _snapshot(self) -> Snapshot:
        assert self._dispatcher is not None
        return self._dispatcher.snapshot()

    def worker_lost(self, key: InstanceKey) -> None:
        """Tell the gateway, from any thread, that an incarnation is dead, ahead of its heartbeats running out."""
        if self._loop is not None and self._dispatcher is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the gateway has ended
                self._loop.call_soon_threadsafe(self._dispatcher.worker_lost, key)

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop is None:
            work.close()
            raise LaunchError("the gateway has not started")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _drain(self, timeout_s: float) -> bool:
        dispatcher, server = self._dispatcher, self._server
        assert dispatcher is not None
        assert server is not None
        dispatcher.draining = True
        deadline_s = self._clock.now() + timeout_s
        while (left := dispatcher.in_flight + server.answering) and self._clock.now() < deadline_s:
            await asyncio.sleep(0.02)
        return left == 0

    def _run(self) -> None:
        try:
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:  # the thread's boundary: what `start` waits for must never be lost
            if self._started.is_set():
                log.exception("gateway ended")
            self._failure = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        with contextlib.ExitStack() as stack:
            gateway = self._config.gateway
            codec = TextCodec.load(self._model_path)
            door = stack.enter_context(Door(self._keys))
            mailbox = Mailbox(door, self._mailbox_host)
            stack.callback(mailbox.close)
            peers, keeping = self._make_peers(door), self._make_peers(door)
            stack.callback(peers.close)
            stack.callback(keeping.close)
            tokenizing = Tokenizing()
            stack.callback(tokenizing.close)
            metrics = Metrics()
            self._address = Address(self._name, self._incarnation, mailbox.endpoint)
            events = _Later()
            fault: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            awaited = AwaitedAttempts(self._address, self._config.transfer.lease_s, self._clock.now())
            pump = Pump(mailbox, keeping, awaited, events, self._clock, fault.set_exception)
            dispatcher = self._make_dispatcher(peers, pump, metrics)
            events.target = dispatcher.deliver
            metrics.watch(dispatcher.snapshot)
            model = self._model_info()
            intake = Intake(model, codec, tokenizing, dispatcher, self._clock, gateway.max_n)

            def more_invariants() -> dict[str, int]:
                lost = peers.lost + keeping.lost
                return {"malformed_messages": mailbox.rejected, "lost_messages": lost, "tasks": len(asyncio.all_tasks())}

            status = StatusRoutes(intake, dispatcher, metrics, self._clock, _version(), more_invariants)
            generating = GeneratingRoutes(intake, gateway, self._clock, metrics)
            app = create_app(generating, status, metrics, gateway.api_key, self._keys.transfer_secret)
            limits = ConnectionLimits(gateway.read_timeout_s, gateway.max_connections)
            server = HttpServer(app, gateway.host, gateway.port, limits)
            stack.callback(server.close)
            self._loop, self._dispatcher, self._server = asyncio.get_running_loop(), dispatcher, server
            pump.start(self._loop)
            stack.callback(pump.stop)
            await self._until_stopped(dispatcher, server, fault)

    def _model_info(self) -> ModelInfo:
        config = self._config
        names = config.gateway.served_model_names or (self._model_path.name,)
        defaults = sampling_defaults(self._model_path) if config.gateway.generation_config == "auto" else SamplingDefaults()
        if defaults != SamplingDefaults():
            log.info("sampling defaults are the model's own", defaults=msgspec.to_builtins(defaults))
        return ModelInfo(names, config.model, int(time.time()), config.max_model_len, defaults)

    async def _until_stopped(self, dispatcher: Dispatcher, server: HttpServer, fault: asyncio.Future[None]) -> None:
        """Serve until the server is told to stop; raises what `fault` holds if that comes first."""
        sweeping = asyncio.create_task(self._sweep(dispatcher))
        try:
            serving = asyncio.create_task(server.run())
            await server.ready(serving)
            self._started.set()
            if self._on_ready is not None:
                self._on_ready(self)
            await asyncio.wait({serving, fault}, return_when=asyncio.FIRST_COMPLETED)
            if fault.done():
                dispatcher.close_all(Unavailable("the gateway has failed"))
                server.stop()
            await serving
            if fault.done():
                fault.result()
        finally:
            sweeping.cancel()

    async def _sweep(self, dispatcher: Dispatcher) -> None:
        dead_after_s = self._config.health.dead_after_s
        interval_s = min(0.5, dead_after_s / SWEEPS_PER_SILENCE)
        while True:
            began_s = self._clock.now()
            await asyncio.sleep(interval_s)
            late_s = self._clock.now() - began_s - interval_s
            try:
                if late_s > dead_after_s / 2:
                    log.warning("the gateway stood still", seconds=late_s)
                    dispatcher.was_deaf(late_s)
                dispatcher.sweep()
            except Exception:  # health must go on being watched whatever one sweep met
                log.exception("sweep failed")

    def _make_dispatcher(self, peers: MessageSender, pump: Pump, metrics: Metrics) -> Dispatcher:
        gateway, health = self._config.gateway, self._config.health
        limits = Limits(
            request_timeout_s=gateway.request_timeout_s,
            max_attempts=gateway.max_attempts,
            max_concurrent=gateway.max_concurrent,
        )
        cluster = ClusterState(health.dead_after_s, health.stuck_after_s)
        life = LifeCycle(self._policy, cluster, Journal(), limits)
        return Dispatcher(address=self.address, peers=peers, pump=pump, life=life, metrics=metrics, clock=self._clock)


class _Later:
    """A callback whose target is known later: the pump and the dispatcher need each other."""

    target: Callable[[list[Any]], None] | None = None

    def __call__(self, events: list[Any]) -> None:
        if self.target is not None:
            self.target(events)


def _version() -> str:
    try:
        return metadata.version("hetserve")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "0+source"
