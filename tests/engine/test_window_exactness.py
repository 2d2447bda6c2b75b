"""Prompts many sliding windows long: the tokens are those of `transformers` alone, with a cache that has no room for them in all
layers. `test_hand_over.py` hands such prompts over."""

from __future__ import annotations

import random
from typing import Any

import pytest

from core.clock import ManualClock
from core.config import EngineConfig
from core.groups import NO_BLOCK
from engine.attention.select import select
from engine.engine import Engine
from engine.kv_cache import allocate, layout_of
from engine.model import load_model
from engine.torch_runner import TorchRunner
from engine.windows import Windows
from tests.engine.test_exactness import generated, greedy, reference_model

WINDOW = 8
FIVE_TO_ONE = {"layers": 6, "config": {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3, 5:1": ("gemma3_text", FIVE_TO_ONE),
    "gpt-oss, 1:1": ("gpt_oss", {"layers": 4}),
    "gemma2": ("gemma2", {"layers": 3}),
    "mistral, all": ("mistral", {}),
}
CONFIG = EngineConfig(max_num_batched_tokens=16, max_num_seqs=2, headroom_tokens=0)


def prompts(count: int) -> list[list[int]]:
    """Of 42 to 100 tokens, which begin with the same 41, but for every fourth."""
    rng = random.Random(4)
    shared = [rng.randrange(5, 500) for _ in range(41)]
    return [
        [*(shared if i % 4 else shared[::-1]), *(rng.randrange(5, 500) for _ in range(rng.randint(1, 59)))] for i in range(count)
    ]


def runner_of(folder: Any, block_size: int, steps_ahead: int, attention: str = "auto") -> TorchRunner:
    """With twice as many blocks as the longest sequence can do with."""
    loaded = load_model(folder)
    layout = layout_of(loaded.layers, loaded.dtype, block_size)
    groups = allocate(layout, 1, loaded.device).groups
    windows = Windows(groups, block_size, 1, CONFIG.max_num_batched_tokens, steps_ahead)
    blocks = 2 * windows.needed(112, CONFIG.max_num_batched_tokens)
    selection = select(attention, loaded.layers, loaded.dtype, loaded.device)
    return TorchRunner(loaded, selection, allocate(layout, blocks, loaded.device), steps_ahead=steps_ahead)


@pytest.fixture
def folder_of(model_folder):
    def make(kind: str):
        architecture, options = KINDS[kind]
        folder = model_folder(architecture, sliding_window=WINDOW, **options)
        return folder, reference_model(folder, architecture)

    return make


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("steps_ahead", "attention"), [(0, "auto"), (1, "auto"), (2, "sdpa")])
def test_tokens_are_those_of_generate_in_bounded_memory(folder_of, kind, steps_ahead, attention):
    folder, model = folder_of(kind)
    runner, wanted = runner_of(folder, 4, steps_ahead, attention), prompts(10)
    sequences = greedy(wanted)
    engine = Engine(runner, CONFIG, ManualClock())
    windowed = [group for group, shape in enumerate(engine.groups.groups) if shape.sliding_window is not None]
    most = 0
    for sequence in sequences:
        engine.add(sequence)
    while engine.has_work:
        assert engine.step().failed == ()
        for sequence in sequences:
            for group in windowed if sequence.tables else ():
                most = max(most, len(sequence.tables[group]) - sequence.tables[group].count(NO_BLOCK))
        assert [line for line in engine.invariants() if "is still" not in line] == []
    assert engine.invariants() == []
    assert most <= -(-(WINDOW - 1 + 16 * (1 + steps_ahead)) // 4) + 1
    assert runner.num_blocks < 2 * len(engine.groups.groups) * -(-112 // 4)
    assert sum(sequence.cached_tokens for sequence in sequences) > 0
    assert [s.tokens[s.prompt_tokens :] for s in sequences] == [generated(model, prompt) for prompt in wanted]
