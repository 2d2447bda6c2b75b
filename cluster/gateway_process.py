"""The gateway as an actor holds it: the service, started from plain data, with the same calls as an instance."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field

from core.config import ClusterConfig
from core.messages import Address
from instance.model_source import model_folder
from mail.keys import ClusterKeys


@dataclass(frozen=True)
class GatewaySpec:
    """All that a gateway must know to start. `host` is where it takes workers' messages; HTTP is `config.gateway`'s."""

    name: str
    incarnation: int
    config: ClusterConfig
    keys: ClusterKeys
    host: str = "127.0.0.1"


@dataclass(frozen=True)
class GatewayReport:
    """What a gateway opened. `seconds` breaks its start-up down by stage."""

    address: Address
    url: str
    pid: int
    seconds: dict[str, float] = field(default_factory=dict)


class GatewayProcess:
    """Serves from `start` until `stop`."""

    def __init__(self, spec: GatewaySpec) -> None:
        from gateway.gateway import Gateway  # transformers and uvicorn: only in the gateway's own process

        transfer = spec.config.transfer.model_copy(update={"host": spec.config.transfer.host or spec.host})
        config = spec.config.model_copy(update={"transfer": transfer})
        model = model_folder(config.model, weights=False)
        self._service = Gateway(config, spec.keys, model, name=spec.name, incarnation=spec.incarnation)

    def start(self) -> GatewayReport:
        """Raises PortInUse, ModelError or LaunchError."""
        began_s = time.perf_counter()
        self._service.start()
        return GatewayReport(self._service.address, self._service.url, os.getpid(), {"open": time.perf_counter() - began_s})

    def connect(self, gateways: Iterable[Address]) -> None:
        """Gateways learn of workers by their heartbeats, and of one another not at all."""

    def lost(self, name: str, incarnation: int) -> None:
        """An instance is known to be dead, before its heartbeats have run out."""
        self._service.worker_lost((name, incarnation))

    @property
    def progress_age_s(self) -> float | None:
        """A gateway has no steps."""
        return None

    def wait(self) -> None:
        """Blocks until the gateway has ended; raises what ended it, if that was not `stop`."""
        self._service.wait()

    def drain(self, timeout_s: float) -> bool:
        return self._service.drain(timeout_s)

    def stop(self) -> None:
        self._service.stop()

    def invariants(self) -> list[str]:
        return self._service.invariants()
