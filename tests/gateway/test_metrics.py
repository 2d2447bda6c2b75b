from __future__ import annotations

import pytest

from core.cost import CostModel
from core.layout import KVLayout, LayerShape
from core.messages import Address, Heartbeat, Load
from gateway.serving.metrics import Metrics
from router.state import ClusterState


@pytest.mark.parametrize(("windows", "layers_of_a_block"), [((None, None), 2), ((33, None), 1), ((33, 33, 33, None, None), 3)])
def test_kv_in_use_is_what_the_pages_of_its_blocks_take(windows, layers_of_a_block):
    """Layers with another window are in a group of their own, and a block is a page of one group."""
    state, metrics = ClusterState(1.5, 3.0), Metrics()
    state.observe(
        Heartbeat(
            worker=Address("m0", 1, "tcp://127.0.0.1:4001"),
            role="mixed",
            accelerator="CPU",
            model="tiny",
            fingerprint="f",
            layout=KVLayout.whole(layers=[LayerShape(2, 8, 8, window) for window in windows], dtype="float32", block_size=16),
            total_blocks=100,
            capacity_tokens=1600,
            max_model_len=1024,
            max_num_seqs=8,
            kv_endpoint="127.0.0.1:1",
            cost=CostModel(),
            load=Load(free_blocks=90),
        ),
        0.0,
    )
    metrics.watch(state.snapshot)
    used_bytes = 10 * 16 * layers_of_a_block * 2 * (8 + 8) * 4
    labels = {"instance": "m0", "role": "mixed", "accelerator": "CPU"}
    assert metrics.registry.get_sample_value("hetserve_instance_kv_used_bytes", labels) == used_bytes
