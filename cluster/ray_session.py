"""The connection to Ray: an existing cluster, or one started on this machine for as long as the session lasts.

A local Ray is private: its sockets listen on loopback, every call carries a token made for it, no dashboard runs, nothing is
reported to anybody, and it ends with the session. Ray reads that from the environment while it is imported, so this file
imports it only when it connects.

Neighbours: `cluster.placement` works on the `Node`s read here; `cluster.launch` owns the session.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from cluster.own_processes import OwnProcesses
from cluster.placement import Node
from core.errors import LaunchError

ADDRESS_VARIABLE = "RAY_ADDRESS"
OBJECT_STORE_BYTES = 100 << 20
"""The least Ray takes: nothing of ours goes through its object store but reports."""
REACH_TIMEOUT_S = 3.0
LOCAL_SYSTEM_CONFIG = {
    "enable_worker_prestart": False,
    "prestart_worker_first_driver": False,
    "kill_worker_timeout_milliseconds": 500,
}
"""Our actors need an environment of their own, so that processes started ahead for plain tasks would only cost start-up time.
A process that is stopped and cannot end itself is killed half a second later, not five."""


def ray_address(environment: MutableMapping[str, str] | None = None) -> str | None:
    """The cluster to join, None to start one. `ray job submit` sets the variable for the command it runs."""
    return (os.environ if environment is None else environment).get(ADDRESS_VARIABLE) or None


def prepare_local(environment: MutableMapping[str, str]) -> None:
    """Make the next local Ray private. What the user has set explicitly stays."""
    environment.setdefault("RAY_AUTH_MODE", "token")
    if environment["RAY_AUTH_MODE"] == "token" and "RAY_AUTH_TOKEN_PATH" not in environment:
        environment.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    environment.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # the switch by which a node takes a loopback address
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    environment.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # an actor that asks for no GPU sees none


@dataclass
class RaySession:
    """An open connection. `local` is whether Ray runs for it alone; `seconds` says what opening it took."""

    local: bool
    owned: bool
    processes: OwnProcesses
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, address: str | None = None, verbose: bool = False) -> RaySession:
        """Join the cluster at `address` (`host:port` or `auto`), or start a local Ray when it is None.

        A process that is connected already keeps its connection, and `close` leaves it open.

        Raises:
            LaunchError: Ray cannot be reached, or does not start.
        """
        began_s = time.perf_counter()
        if address is None:
            prepare_local(os.environ)
        else:
            _check_reachable(address)
        imported = "ray" in sys.modules
        import ray

        if imported and address is None:
            read_environment_again()
        seconds = {"import ray": time.perf_counter() - began_s}
        processes = OwnProcesses()
        if ray.is_initialized():
            return cls(local=False, owned=False, processes=processes, seconds=seconds)
        began_s = time.perf_counter()
        options: dict[str, object] = {"logging_level": "INFO" if verbose else "ERROR", "log_to_driver": verbose}
        if address is None:
            options |= {"include_dashboard": False, "object_store_memory": OBJECT_STORE_BYTES}
            options["_system_config"] = dict(LOCAL_SYSTEM_CONFIG)
        try:
            with _own_signals(), _own_words(verbose):
                ray.init(address=address or "local", **options)
        except (ConnectionError, RuntimeError, ValueError, OSError) as error:
            where = "on this machine" if address is None else f"at {address}"
            raise LaunchError(f"Ray {where}: {error}") from error
        seconds["start ray" if address is None else "connect to ray"] = time.perf_counter() - began_s
        processes.note()
        return cls(local=address is None, owned=True, processes=processes, seconds=seconds)

    @property
    def driver_node_id(self) -> str:
        import ray

        node_id: str = ray.get_runtime_context().get_node_id()
        return node_id

    def nodes(self) -> list[Node]:
        """The nodes that are alive, with what is free on each."""
        import ray
        from ray._private.state import available_resources_per_node

        free = available_resources_per_node()
        return [
            Node(
                node_id=node["NodeID"],
                name=node["NodeManagerHostname"],
                address=node["NodeManagerAddress"],
                labels=dict(node["Labels"]),
                total=dict(node["Resources"]),
                free=dict(free.get(node["NodeID"], node["Resources"])),
            )
            for node in ray.nodes()
            if node["Alive"]
        ]

    def close(self) -> None:
        """Disconnect; a local Ray ends, with every process it started. Idempotent."""
        import ray

        if self.owned and ray.is_initialized():
            self.processes.note()
            ray.shutdown()
        if self.local:
            self.processes.end()


@contextmanager
def _own_signals() -> Iterator[None]:
    """Ray puts its own SIGTERM handler in; whoever calls us keeps theirs."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _own_words(verbose: bool) -> Iterator[None]:
    """Unless `verbose`: without the thread by which Ray prints a paragraph on the driver's standard output for each worker that
    dies. It has no option for that, and the controller has a line of its own for the event."""
    from ray._private import worker

    before = worker.listen_error_messages
    if not verbose:
        worker.listen_error_messages = lambda worker, threads_stopped: None
    try:
        yield
    finally:
        worker.listen_error_messages = before


def read_environment_again() -> None:
    """For a program that imported Ray before the environment was prepared: what Ray keeps of it from its import."""
    from ray._private import ray_constants
    from ray._raylet import Config  # type: ignore[attr-defined]  # of compiled code

    Config.initialize("")
    name = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
    ray_constants.ENABLE_RAY_CLUSTER = ray_constants.env_bool(name, ray_constants.ENABLE_RAY_CLUSTER)


def _check_reachable(address: str) -> None:
    """Fail in seconds where Ray would retry for a minute."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_TIMEOUT_S).close()
    except OSError as error:
        raise LaunchError(f"Ray cannot be reached at {address}: {error.strerror or error}") from error
