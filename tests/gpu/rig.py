"""What tests of whole engines on a GPU share."""

from __future__ import annotations

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.sampling import SamplingParams
from engine.engine import Engine
from engine.sequence import Sequence
from engine.torch_runner import TorchRunner

OUTPUT = 16


def sequences(prompts: list[list[int]], hold: bool = False, **options: object) -> list[Sequence]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": OUTPUT, "ignore_eos": True, **options})  # type: ignore[arg-type]
    return [Sequence(str(i), list(prompt), len(prompt), params, hold=hold) for i, prompt in enumerate(prompts)]


def finish(engine: Engine) -> None:
    while engine.has_work:
        assert engine.step().failed == ()


def reference(folder, device, dtype):
    config = copy.deepcopy(AutoConfig.from_pretrained(folder))
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation="sdpa").to(device).eval()


def generated(model, prompt: list[int], device: torch.device) -> list[int]:
    ids = torch.tensor([prompt], device=device)
    options = {"max_new_tokens": OUTPUT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0].tolist()


def copy_kv(source: TorchRunner, blocks: list[int], target: TorchRunner, into: list[int], tokens: int) -> None:
    """Token by token, since the two block sizes differ."""
    for layer, (have, want) in enumerate(zip(source.layers, target.layers, strict=True)):
        assert layer < len(source.layout.layers)
        sizes = source.layout.block_size, target.layout.block_size
        for pages, empty in ((have.key, want.key), (have.value, want.value)):
            rows = torch.tensor([blocks[i // sizes[0]] * sizes[0] + i % sizes[0] for i in range(tokens)], device=pages.device)
            slots = torch.tensor([into[i // sizes[1]] * sizes[1] + i % sizes[1] for i in range(tokens)], device=pages.device)
            empty.flatten(0, 1)[slots] = pages.flatten(0, 1)[rows]
