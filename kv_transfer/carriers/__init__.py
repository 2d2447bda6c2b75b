"""Each carrier implements `kv_transfer.carrier.Carrier`."""

from __future__ import annotations

from core.errors import ConfigError
from kv_transfer.carrier import Carrier
from kv_transfer.carriers.inline import INLINE
from kv_transfer.carriers.shared_memory import SHARED_MEMORY


def carriers_for(transport: str, host: str = "127.0.0.1") -> tuple[Carrier, ...]:
    """The carriers that `transfer.transport` allows, best first. More than one means that a pair takes the first that works
    for it; one means that a pair for which it does not work is refused. `host` is the only one that a carrier listens on.

    Raises:
        ConfigError: no such transport.
    """
    match transport:
        case "auto":
            return SHARED_MEMORY, *INLINE
        case "tcp":
            return INLINE
        case "shm":
            return (SHARED_MEMORY,)
        case "distributed":
            from kv_transfer.carriers.distributed import DistributedCarrier  # torch, which others do without

            return (DistributedCarrier(host),)
    raise ConfigError(f"Got {transport = } but expected auto, tcp, shm or distributed", "transfer.transport")
