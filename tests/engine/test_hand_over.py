"""Two engines, KV sent between them while it is computed: the tokens are those of `transformers` alone."""

from __future__ import annotations

from typing import Any

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
    assert pair.kv_bytes == pair.needed_bytes > 0


FULL, SLIDING = "full_attention", "sliding_attention"
WINDOWED: dict[str, dict[str, Any]] = {
    "gemma3_text": {"layers": 6, "config": {"layer_types": [SLIDING] * 5 + [FULL]}},
    "gpt_oss": {"layers": 4},
    "mistral": {"layers": 3},
}


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("architecture", WINDOWED)
def test_only_what_windows_see_goes_over_and_the_tokens_are_generates(model_folder, architecture, steps_ahead):
    """Prompts of several windows in chunks shorter than most; then each goes on from its own output, which the writing engine has
    cached as far as its windows have seen it."""
    folder = model_folder(architecture, sliding_window=8, **WINDOWED[architecture])
    runners = [TorchRunner.load(folder, EngineConfig(block_size=size, kv_bytes=4 << 20)) for size in (8, 12)]
    for runner in runners:
        runner._steps_ahead = steps_ahead
    model = reference_model(folder, architecture)
    prompts, cached, moved = ragged_prompts(12, seed=9), [], []
    with HandOver(*runners, EngineConfig(max_num_batched_tokens=20)) as pair:
        assert pair.reader.groups.windowed
        for turn in range(2):
            reading, writing = greedy(prompts, prefix=f"{turn}-"), greedy(prompts, prefix=f"{turn}-")
            for sequence in reading:
                sequence.hold = True
            pair.serve(reading, writing)
            written = [sequence.tokens[sequence.prompt_tokens :] for sequence in writing]
            assert written == [generated(model, prompt) for prompt in prompts]
            assert pair.kv_bytes == pair.needed_bytes
            cached.append(sum(sequence.cached_tokens for sequence in writing))
            moved.append(pair.kv_bytes)
            prompts = [prompt + output + [7, 11, turn] for prompt, output in zip(prompts, written, strict=True)]
    everything = sum(len(sequence.tokens) - sequence.cached_tokens for sequence in reading) * runners[0].layout.bytes_per_token
    assert cached[0] == 0 < cached[1]
    assert moved[1] - moved[0] < everything
