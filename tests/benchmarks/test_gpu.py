"""The arithmetic of the GPU benchmark, and its driving of an engine, on a machine without one."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from benchmarks.gpu import (
    Bench,
    Device,
    Weights,
    decode_share,
    main,
    measure,
    parse_options,
    prefill_share,
    table_of,
    weights_of,
)
from core.clock import ManualClock
from core.config import EngineConfig
from engine.engine import Engine
from engine.model import load_model
from engine.torch_runner import TorchRunner
from tests.support.engines import simulated_runner
from tooling.model_factory import SIZES, make_model

WEIGHTS = Weights(body=1000, head=100, itemsize=2, kv_bytes_per_token=10)
DEVICE = Device("device", "date", "2.13", "13", "5", bytes_per_s=1000.0, flop_per_s=1e6)


def test_a_decode_step_reads_all_weights_once_and_every_context():
    assert decode_share(WEIGHTS, 0, 1.0, 2200.0) == pytest.approx(1.0)
    assert decode_share(WEIGHTS, 80, 1.0, 3000.0) == pytest.approx(1.0)
    assert decode_share(WEIGHTS, 80, 2.0, 3000.0) == pytest.approx(0.5)


def test_prefill_multiplies_the_body_for_each_token_and_the_head_for_each_prompt():
    assert prefill_share(WEIGHTS, 50, 0, 1.0, 100_000.0) == pytest.approx(1.0)
    assert prefill_share(WEIGHTS, 50, 5, 1.0, 101_000.0) == pytest.approx(1.0)
    assert prefill_share(WEIGHTS, 50, 5, 4.0, 101_000.0) == pytest.approx(0.25)


def test_the_weights_counted_are_those_of_the_model(tmp_path):
    dims = SIZES["tiny"]
    loaded = load_model(make_model(tmp_path / "m", "llama"))
    weights, head = weights_of(dims, 4), loaded.model.get_output_embeddings().weight
    norms = sum(p.numel() for p in loaded.model.parameters() if p.dim() == 1)
    assert loaded.model.get_input_embeddings().weight is not head
    assert weights.head == head.numel()
    assert weights.body + weights.head + norms == loaded.shape.parameters
    assert weights.kv_bytes_per_token == loaded.shape.kv_bytes_per_token


def test_a_real_engine_is_driven_through_prefill_and_decode(tmp_path):
    dims = SIZES["tiny"]
    config = EngineConfig(kv_bytes=4 << 20, max_num_seqs=3, max_num_batched_tokens=16, prefix_cache=False)
    runner = TorchRunner.load(make_model(tmp_path / "m", "llama"), config)
    options = parse_options(["--batches", "1,3", "--prompt", "20", "--context", "30", "--steps", "4", "--repeats", "1"])
    engine = Engine(runner, config, ManualClock())
    rows = measure(Bench(engine, dims.vocab_size), weights_of(dims, 4), DEVICE, options, "eager")
    assert [(row.phase, row.batch) for row in rows] == [
        ("prefill 20", 1), ("prefill 20", 3), ("decode at 30", 1), ("decode at 30", 3)
    ]  # fmt: skip
    assert all(row.tokens_per_s > 0 and row.share > 0 for row in rows)
    assert engine.invariants() == []
    assert json.loads(json.dumps([asdict(row) for row in rows]))[0]["limit"] == "bf16 products"
    assert table_of(rows, DEVICE, "tiny").row_count == 4


def test_rates_are_medians_of_the_injected_timer_without_the_warm_up():
    engine = Engine(simulated_runner(num_blocks=400), EngineConfig(prefix_cache=False), ManualClock())
    seconds = iter([100.0, 100.0, 100.0, 1.0, 7.0, 2.0])
    now, odd = [0.0], [False]

    def timer() -> float:
        if odd[0]:
            now[0] += next(seconds)
        odd[0] = not odd[0]
        return now[0]

    assert Bench(engine, 50, timer).decode_step_s(2, 20, steps=3) == 2.0
    assert engine.invariants() == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_with_one_clear_line():
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu needs a CUDA device, and torch sees none on this machine$"):
        main(["--no-tests"])
