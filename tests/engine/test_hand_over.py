"""Two engines, KV sent between them while it is computed: the tokens are those of `transformers` alone."""

from __future__ import annotations

import pytest

from core.config import EngineConfig
from engine.torch_runner import TorchRunner
from tests.engine.test_exactness import generated, greedy, ragged_prompts, reference_model
from tests.support.hand_over import HandOver

CONFIG = EngineConfig(max_num_batched_tokens=48)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text"])
@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_a_prefill_and_a_decode_engine_of_unlike_blocks_give_generates_tokens(model_folder, architecture, steps_ahead):
    folder, prompts = model_folder(architecture, sliding_window=8), ragged_prompts(12, seed=9)
    runners = [TorchRunner.load(folder, EngineConfig(block_size=size, kv_bytes=2 << 20)) for size in (8, 12)]
    for runner in runners:
        runner._steps_ahead = steps_ahead
    reading, writing = greedy(prompts), greedy(prompts)
    for sequence in reading:
        sequence.hold = True
    with HandOver(*runners, CONFIG) as pair:
        pair.serve(reading, writing)
    model = reference_model(folder)
    assert [s.tokens[s.prompt_tokens :] for s in writing] == [generated(model, prompt) for prompt in prompts]
    assert sum(s.cached_tokens for s in reading) > 0
    assert pair.kv_bytes > 0
