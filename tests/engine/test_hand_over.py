"""Two engines, KV sent between them while it is computed: the tokens are those of `transformers` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.config import EngineConfig
from core.groups import layer_groups
from engine.attention.select import select
from engine.kv_cache import allocate, layout_of
from engine.model import load_model
from engine.torch_runner import TorchRunner
from engine.windows import Windows
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
    "gemma2": {"layers": 3},
    "mistral": {"layers": 3},
}
CHUNK, BLOCK_SIZE, LONGEST = 20, 8, 76


def tight_runner(folder: Path, steps_ahead: int) -> TorchRunner:
    """With what the longest prompt needs and one block more: fewer than all of its KV would fill."""
    loaded = load_model(folder)
    layout = layout_of(loaded.layers, loaded.dtype, BLOCK_SIZE)
    groups = layer_groups(layout)
    windows = Windows(groups, BLOCK_SIZE, CHUNK, steps_ahead)
    blocks = 1 + sum(windows.reach(group, LONGEST, decodes=False) for group in groups.groups)
    assert blocks < len(groups.groups) * layout.blocks_for(LONGEST)
    selection = select("auto", loaded.layers, loaded.dtype, loaded.device)
    return TorchRunner(loaded, selection, allocate(layout, blocks, loaded.device), steps_ahead=steps_ahead)


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("architecture", WINDOWED)
def test_only_what_windows_see_goes_over_and_the_tokens_are_generates(model_folder, architecture, steps_ahead):
    """Prompts of several windows in chunks, through a cache where blocks change hands all the time; then again, each a little
    shorter, so that its window begins before what the writing engine has of it; then each goes on from its own output."""
    folder = model_folder(architecture, sliding_window=8, **WINDOWED[architecture])
    writer = TorchRunner.load(folder, EngineConfig(block_size=12, kv_bytes=4 << 20))
    writer._steps_ahead = steps_ahead
    runners = tight_runner(folder, steps_ahead), writer
    model = reference_model(folder, architecture)
    prompts, cached, moved = ragged_prompts(12, seed=9), [], []
    with HandOver(*runners, EngineConfig(max_num_batched_tokens=CHUNK)) as pair:
        assert pair.reader.groups.windowed
        for turn in range(3):
            assert max(map(len, prompts)) <= LONGEST
            reading, writing = greedy(prompts, prefix=f"{turn}-"), greedy(prompts, prefix=f"{turn}-")
            for sequence in reading:
                sequence.hold = True
            pair.serve(reading, writing)
            written = [sequence.tokens[sequence.prompt_tokens :] for sequence in writing]
            assert written == [generated(model, prompt) for prompt in prompts]
            assert pair.kv_bytes == pair.needed_bytes
            cached.append(sum(sequence.cached_tokens for sequence in writing))
            moved.append(pair.kv_bytes)
            if turn == 0:
                prompts = [prompt[: max(1, len(prompt) - 2)] for prompt in prompts]
            else:
                prompts = [prompt + output + [7, 11] for prompt, output in zip(prompts, written, strict=True)]
    assert 0 == cached[0] <= cached[1] < cached[2]
    full = any(shape.sliding_window is None for shape in writer.layout.layers)
    assert (cached[1] > 0) == full, "of what the shorter prompt sees in windows, the first block came in part only"
    assert moved[0] < sum(len(prompt) for prompt in ragged_prompts(12, seed=9)) * writer.layout.bytes_per_token
