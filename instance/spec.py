"""What an instance is told when it starts, and what it reports when it has: plain data that travels to and from actors."""

from __future__ import annotations

from dataclasses import dataclass, field

from core.config import ClusterConfig, EngineConfig, Role
from core.messages import Address
from mail.keys import ClusterKeys


@dataclass(frozen=True)
class InstanceSpec:
    """All that an instance must know to start.

    Attributes:
        pool: index of its pool in `config.pools`.
        threads: CPU threads for compute.
        device: `cuda` or `cpu`.
        node: name of the machine it runs on, for people.
        host: address to listen on, reachable from the other nodes.
    """

    name: str
    incarnation: int
    role: Role
    accelerator: str
    config: ClusterConfig
    pool: int
    keys: ClusterKeys
    gateways: tuple[Address, ...] = ()
    threads: int = 1
    device: str = "cpu"
    node: str = ""
    host: str = "127.0.0.1"

    @property
    def engine(self) -> EngineConfig:
        return self.config.engine_of(self.config.pools[self.pool])


@dataclass(frozen=True)
class InstanceReport:
    """What an instance built. `seconds` breaks its start-up down by stage."""

    address: Address
    kv_endpoint: str
    total_blocks: int
    pid: int
    seconds: dict[str, float] = field(default_factory=dict)
