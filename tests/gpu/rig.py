"""What tests of whole engines on a GPU share."""

from __future__ import annotations

import copy

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from core.sampling import SamplingParams
from engine.engine import Engine
from engine.sequence import Sequence

OUTPUT = 16


def sequences(prompts: list[list[int]], hold: bool = False, **options: object) -> list[Sequence]:
    params = SamplingParams(**{"temperature": 0.0, "max_tokens": OUTPUT, "ignore_eos": True, **options})
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
