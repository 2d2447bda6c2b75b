"""One file per carrier; each implements `kv_transfer.carrier.Carrier`."""

from __future__ import annotations

from core.errors import ConfigError
from kv_transfer.carrier import Carrier
from kv_transfer.carriers.inline import INLINE
from kv_transfer.carriers.shared_memory import SHARED_MEMORY


def carriers_for(transport: str) -> tuple[Carrier, ...]:
    """The carriers that `transfer.transport` allows, best first. More than one means that a pair takes the first that works
    for it; one means that a pair for which it does not work is refused.

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
    raise ConfigError(f"Got {transport = } but expected auto, tcp or shm", "transfer.transport")
