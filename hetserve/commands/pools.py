"""Pools from flags: how many instances of each role, on what, with how much of a GPU."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetserve.commands.usage import UsageError

ROLES = ("prefill", "decode", "mixed")
MEMORY_SHARE = 0.9


@dataclass(frozen=True)
class PoolFlags:
    """Flags by role; None was not given. `gpus` is per instance."""

    replicas: Mapping[str, int | None] = field(default_factory=dict)
    accelerators: Mapping[str, str | None] = field(default_factory=dict)
    gpus: float | None = None

    @property
    def given(self) -> bool:
        return self.gpus is not None or any(value is not None for value in (*self.replicas.values(), *self.accelerators.values()))


def with_flags(data: dict[str, Any], flags: PoolFlags, *, local: bool, gpus_here: int | None = None) -> dict[str, Any]:
    """The configuration with pools as the flags want them.

    Pools of a file are changed; without any, they are made: one prefill and one decode instance unless told otherwise, and
    if nothing says how many GPUs they get and Ray is to be started here (`local`), this machine's are shared out evenly.

    Raises:
        UsageError: a flag for a role of which the file has several pools.
    """
    if data.get("pools"):
        return {**data, "pools": _changed(data["pools"], flags)} if flags.given else data
    counts = _counts(flags)
    instances = sum(counts.values())
    share = flags.gpus
    engine = dict(data.get("engine", {}))
    if share is None:
        share = _share(visible_gpus() if gpus_here is None else gpus_here, instances) if local else 0.0
        if 0 < share < 1:
            engine.setdefault("memory_utilization", round(MEMORY_SHARE * share, 3))
    pools = [_pool(role, count, flags.accelerators.get(role), share) for role, count in counts.items() if count]
    return {**data, "engine": engine, "pools": pools}


def visible_gpus(environment: Mapping[str, str] | None = None, devices: Path = Path("/dev")) -> int:
    """NVIDIA GPUs of this machine that a process started here may use."""
    allowed = (os.environ if environment is None else environment).get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        return len([name for name in allowed.split(",") if name.strip() not in ("", "-1")])
    return sum(1 for path in devices.glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name))


def _counts(flags: PoolFlags) -> dict[str, int]:
    mixed_alone = bool(flags.replicas.get("mixed")) and not any(flags.replicas.get(role) for role in ("prefill", "decode"))
    defaults = {"prefill": 0, "decode": 0, "mixed": 0} if mixed_alone else {"prefill": 1, "decode": 1, "mixed": 0}
    counts = {}
    for role in ROLES:
        given = flags.replicas.get(role)
        counts[role] = defaults[role] if given is None else given
    return counts


def _share(gpus: int, instances: int) -> float:
    """GPUs per instance: a whole one each, or an even part, in hundredths."""
    if gpus == 0 or instances == 0:
        return 0.0
    return 1.0 if gpus >= instances else gpus * 100 // instances / 100


def _pool(role: str, replicas: int, accelerator: str | None, gpus: float) -> dict[str, Any]:
    pool: dict[str, Any] = {"role": role, "replicas": replicas}
    if accelerator is not None:
        pool["accelerator"] = _names(accelerator)
        gpus = gpus or (0.0 if accelerator == "CPU" else 1.0)
    if gpus:
        pool["resources"] = {"gpus": gpus}
    return pool


def _names(accelerator: str) -> str | list[str]:
    names = [name.strip() for name in accelerator.split(",")]
    return names[0] if len(names) == 1 else names


def _changed(pools: list[dict[str, Any]], flags: PoolFlags) -> list[dict[str, Any]]:
    changed = [dict(pool) for pool in pools]
    for role in ROLES:
        replicas, accelerator = flags.replicas.get(role), flags.accelerators.get(role)
        if replicas is None and accelerator is None:
            continue
        mine = [pool for pool in changed if pool["role"] == role]
        if len(mine) > 1:
            raise UsageError(f"--{role}: the file has {len(mine)} {role} pools; change them there")
        if not mine:
            changed.append(_pool(role, 1 if replicas is None else replicas, accelerator, flags.gpus or 0.0))
            continue
        if replicas is not None:
            mine[0]["replicas"] = replicas
        if accelerator is not None:
            mine[0]["accelerator"] = _names(accelerator)
    if flags.gpus is not None:
        for pool in changed:
            pool["resources"] = {**pool.get("resources", {}), "gpus": flags.gpus}
    return changed
