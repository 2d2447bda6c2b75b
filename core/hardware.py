"""Peak figures of common accelerators, from their makers' data sheets, for rooflines until a profile is measured.

Names are Ray's `ray.io/accelerator-type` labels, so that a pool's placement and its cost model speak of the same thing.
"""

from __future__ import annotations

import msgspec


class Accelerator(msgspec.Struct, frozen=True, kw_only=True):
    """Dense bf16 rate in FLOP/s, memory bandwidth and network in bytes/s."""

    name: str
    flops: float
    memory_bytes_per_s: float
    network_bytes_per_s: float = 3e9


ACCELERATORS: dict[str, Accelerator] = {
    device.name: device
    for device in (
        Accelerator(name="H200", flops=989e12, memory_bytes_per_s=4.8e12, network_bytes_per_s=5e10),
        Accelerator(name="H100", flops=989e12, memory_bytes_per_s=3.35e12, network_bytes_per_s=5e10),
        Accelerator(name="A100", flops=312e12, memory_bytes_per_s=2.0e12, network_bytes_per_s=2.5e10),
        Accelerator(name="L40S", flops=362e12, memory_bytes_per_s=864e9),
        Accelerator(name="L4", flops=121e12, memory_bytes_per_s=300e9),
        Accelerator(name="A10G", flops=70e12, memory_bytes_per_s=600e9),
        Accelerator(name="A10", flops=125e12, memory_bytes_per_s=600e9),
        Accelerator(name="RTX4090", flops=165e12, memory_bytes_per_s=1008e9),
        Accelerator(name="RTX3090", flops=71e12, memory_bytes_per_s=936e9),
        Accelerator(name="T4", flops=65e12, memory_bytes_per_s=320e9),
        Accelerator(name="CPU", flops=1e12, memory_bytes_per_s=2e10, network_bytes_per_s=2e9),
    )
}
