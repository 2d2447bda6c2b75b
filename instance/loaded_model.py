"""The part of an instance that depends on the runner: a real model on a device, or a simulated one without weights."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from core.cost import CostModel
from core.errors import ModelError
from core.groups import block_bytes, layer_groups
from core.layout import KVLayout, LayerShape
from engine.plan import ModelRunner
from engine.simulated_runner import SimulatedRunner
from instance.spec import InstanceSpec
from kv_transfer.byte_store import ByteStore
from kv_transfer.store import KVStore

SIMULATED_BLOCK_SIZE = 16
SIMULATED_KV_BYTES = 64 << 20


@dataclass(frozen=True)
class LoadedModel:
    """A runner, the KV it writes, and what peers and the router need to know of both.

    `bind_thread` is called once on each thread that uses the runner.
    """

    runner: ModelRunner
    store: KVStore
    fingerprint: str
    cost: CostModel
    bind_thread: Callable[[], None] = lambda: None
    seconds: dict[str, float] = field(default_factory=dict)


def simulated_model(spec: InstanceSpec) -> LoadedModel:
    """Shapes from the model folder's `config.json`, time from the pool's cost model, tokens from a hash."""
    shape = _read_config(spec.config.model)
    heads = int(shape.get("num_attention_heads", 8))
    head_dim = int(shape.get("head_dim") or shape.get("hidden_size", heads * 64) // heads)
    layer = LayerShape(int(shape.get("num_key_value_heads", heads)), head_dim, head_dim)
    layout = KVLayout.whole(
        layers=(layer,) * int(shape.get("num_hidden_layers", 4)),
        dtype="float32" if spec.config.dtype == "auto" else spec.config.dtype,
        block_size=spec.engine.block_size or SIMULATED_BLOCK_SIZE,
    )
    num_blocks = max(2, (spec.engine.kv_bytes or SIMULATED_KV_BYTES) // block_bytes(layout, layer_groups(layout)))
    cost = CostModel(**(spec.config.pools[spec.pool].cost or {}))
    runner = SimulatedRunner(
        layout=layout,
        num_blocks=num_blocks,
        max_model_len=spec.config.max_model_len or int(shape.get("max_position_embeddings", 4096)),
        vocab_size=int(shape.get("vocab_size", 32_000)),
        cost=cost,
        sleep=time.sleep,
        eos_token_ids=frozenset(),
    )
    fingerprint = f"simulated-{Path(spec.config.model).name}"  # not where it is on this machine
    return LoadedModel(runner, ByteStore(layout, num_blocks), fingerprint, cost)


def _read_config(model: str) -> dict[str, Any]:
    path = Path(model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{model} is not a model folder: cannot read {path.name}: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{model} is not a model folder: {path.name} is not a JSON object")
    return config
