"""Instances in this process, for tests that need real engines, mailboxes and transfers but no Ray."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from core.config import ClusterConfig, parse_config
from core.messages import Address
from instance.instance import Instance
from instance.spec import InstanceSpec
from mail.keys import ClusterKeys

FAST = {"step_s": 5e-4, "prefill_token_s": 1e-6, "attention_s": 0.0, "decode_sequence_s": 0.0, "decode_context_s": 0.0}


def simulated_config(
    folder: Path, *roles: str, engine: dict[str, Any] | None = None, cost: dict[str, float] | None = None, **sections: Any
) -> ClusterConfig:
    """A cluster of simulated instances, one pool of one instance per role; `cost` slows them down."""
    shape = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 1000}
    (folder / "config.json").write_text(json.dumps(shape | {"max_position_embeddings": 2048}))
    return parse_config(
        {
            "model": str(folder),
            "engine": {"runner": "simulated", "block_size": 16, **(engine or {})},
            "pools": [{"role": role, "name": f"{role}-{index}", "cost": FAST | (cost or {})} for index, role in enumerate(roles)],
            **sections,
        }
    )


class Instances:
    """Starts one instance per pool of a configuration, and stops those that still run. Use as a context manager."""

    def __init__(
        self, config: ClusterConfig, gateways: Iterable[Address] = (), *, keys: ClusterKeys, incarnation: int = 1
    ) -> None:
        self._stack = ExitStack()
        self.running: dict[str, Instance] = {}
        self.addresses: list[Address] = []
        for index, pool in enumerate(config.pools):
            spec = InstanceSpec(
                name=config.pool_name(index),
                incarnation=incarnation,
                role=pool.role,
                accelerator="CPU",
                config=config,
                pool=index,
                keys=keys,
                gateways=tuple(gateways),
            )
            instance = Instance(spec)
            self.addresses.append(instance.start().address)
            self.running[spec.name] = instance
            self._stack.callback(instance.stop)

    def settled(self, timeout_s: float = 10.0) -> list[str]:
        """What is left over once they have had time to notice that all is done."""
        until_s = time.monotonic() + timeout_s
        while (left := self._left()) and time.monotonic() < until_s:
            time.sleep(0.02)
        return left

    def _left(self) -> list[str]:
        return [f"{name}: {line}" for name, instance in self.running.items() for line in instance.invariants()]

    def __enter__(self) -> Instances:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
