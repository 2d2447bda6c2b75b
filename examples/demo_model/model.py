"""The two decoders, as numbers: a Llama that answers, and a smaller one of the same vocabulary that guesses ahead for it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from examples.demo_model.attention import register
from examples.demo_model.tokenizer import BOS_ID, END_ID, PAD_ID


@dataclass(frozen=True)
class ModelSize:
    """Sizes in the words of a Llama config.

    Attributes:
        folder: what the exported model's folder is called.
        most_megabytes: what its weights may take when they are shipped.
    """

    folder: str
    most_megabytes: float
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    head_dim: int = 64
    vocab_size: int = 4096
    positions: int = 2048


MAIN = ModelSize("demo", 12, hidden=256, layers=6, heads=4, kv_heads=2, intermediate=768)
DRAFT = ModelSize("demo-draft", 2, hidden=128, layers=2, heads=2, kv_heads=1, intermediate=384)


def make_config(size: ModelSize) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size.vocab_size,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=size.positions,
        tie_word_embeddings=True,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )


def make_model(size: ModelSize, seed: int) -> PreTrainedModel:
    """A fresh model in float32, ready to be trained; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(make_config(size))
    model.set_attn_implementation(register())
    return model.train()


def parameters(model: PreTrainedModel) -> int:
    """How many, tied weights counted once."""
    return sum(parameter.numel() for parameter in model.parameters())
