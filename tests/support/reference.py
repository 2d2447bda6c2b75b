"""What `transformers` itself writes: the oracle for exactness."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM


def generate(folder: Path, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy outputs in fp32, one prompt at a time, with an explicit mask and exactly `new_tokens` each."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        outputs.append(tokens[0, len(prompt) :].tolist())
    return outputs


def prompts(lengths: tuple[int, ...], seed: int = 5, low: int = 3, high: int = 200) -> list[list[int]]:
    """Random prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(low, high, (length,), generator=generator).tolist() for length in lengths]
