"""Heartbeats of made-up instances: what every router test starts from."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from core.cost import CostModel
from core.layout import KVLayout, LayerShape
from core.messages import Address, Heartbeat, Load

Beat = Callable[..., Heartbeat]


@pytest.fixture
def beat() -> Beat:
    """Makes a heartbeat; every keyword has a default."""

    def make(
        name: str = "decode-0",
        role: str = "decode",
        incarnation: int = 1,
        fingerprint: str = "f",
        dtype: str = "float32",
        block_size: int = 16,
        total_blocks: int = 100,
        max_model_len: int = 1024,
        max_num_seqs: int = 8,
        cost: CostModel | None = None,
        windows: tuple[int | None, ...] = (None,),
        **load: object,
    ) -> Heartbeat:
        load.setdefault("free_blocks", total_blocks)
        return Heartbeat(
            worker=Address(name, incarnation, f"tcp://127.0.0.1:{4000 + incarnation}"),
            role=role,
            accelerator="CPU",
            model="tiny",
            fingerprint=fingerprint,
            layout=KVLayout.whole(layers=[LayerShape(2, 8, 8, window) for window in windows], dtype=dtype, block_size=block_size),
            total_blocks=total_blocks,
            capacity_tokens=total_blocks * block_size,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            kv_endpoint="127.0.0.1:1",
            cost=cost or CostModel(),
            load=Load(**load),
        )

    return make
