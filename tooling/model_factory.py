"""Makes model folders with random weights: real `transformers` files, made-up numbers.

For tests, benchmarks and `hetserve make-model`, wherever a checkpoint cannot or need not be downloaded. The folder loads by
the very path that a published model takes (config, safetensors, tokenizer, chat template, generation config).

The weights are drawn for *high entropy*, not as a training run would start: logits are spread so that greedy output varies
with the prompt, the two best logits are rarely close, and biases and norms are off their defaults. A wrong position, head
or page therefore changes the output. Weights depend only on (seed, parameter name, shape), so a folder can be made again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel

from core.errors import ModelError
from engine.model import load_model
from tooling.tiny_tokenizer import BOS_ID, EOS_ID, PAD_ID, train_tokenizer


@dataclass(frozen=True)
class ModelDims:
    """Sizes in the words of a Llama config. `sliding_window` is in tokens; architectures without one ignore it."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab_size: int
    max_position_embeddings: int
    sliding_window: int | None = None
    experts: int = 4


SIZES: dict[str, ModelDims] = {
    "tiny": ModelDims(2, 64, 4, 2, 16, 128, 512, 2048),
    "15m": ModelDims(6, 288, 6, 2, 48, 768, 8192, 4096),
    "125m": ModelDims(12, 768, 12, 4, 64, 2048, 32000, 8192),
    "1b": ModelDims(16, 2048, 32, 8, 64, 8192, 128256, 131072),
    "8b": ModelDims(32, 4096, 32, 8, 128, 14336, 128256, 131072),
}

_LOGIT_SPREAD = 3.0


def make_model(
    folder: str | Path,
    architecture: str = "llama",
    *,
    size: str = "tiny",
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    max_shard_size: str = "2GB",
    config: Mapping[str, Any] | None = None,
    **dims: Any,
) -> Path:
    """Write a random model of one architecture into `folder` and return it.

    Args:
        architecture: a `model_type` of transformers, for instance `llama` or `qwen3_moe`; see `architectures()` for those
            with a recipe. Others are tried with Llama's field names.
        size: a key of `SIZES`.
        dtype: of the stored weights.
        config: raw config fields that win over everything else.
        dims: fields of `ModelDims` that win over the named size (`layers=4`, `vocab_size=1000`, `sliding_window=16`).

    Raises:
        ModelError: no such architecture or size, or sizes that the architecture refuses.
    """
    folder = Path(folder)
    model_config = make_config(architecture, size=size, config=config, **dims)
    torch_dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    try:
        model = AutoModelForCausalLM.from_config(model_config, dtype=torch_dtype)
    except (ValueError, TypeError, AttributeError, KeyError, RuntimeError, AssertionError) as error:
        raise ModelError(f"{architecture}: transformers cannot build a decoder of these sizes: {_first_line(error)}") from error
    fill_weights(model, seed)
    model.generation_config = GenerationConfig(bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=PAD_ID)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    text = model_config.get_text_config()
    train_tokenizer(text.vocab_size, model_max_length=_positions(text)).save_pretrained(folder)
    return folder


def make_config(
    architecture: str, *, size: str = "tiny", config: Mapping[str, Any] | None = None, **dims: Any
) -> PretrainedConfig:
    """The config that `make_model` writes. Raises ModelError as `make_model` does."""
    if size not in SIZES:
        raise ModelError(f"Got {size = } but expected one of {sorted(SIZES)}")
    if architecture not in CONFIG_MAPPING:
        near = get_close_matches(architecture, CONFIG_MAPPING.keys(), n=3)
        advice = f"did you mean {' or '.join(near)}?" if near else f"for instance {', '.join(_PLAIN[:3])}"
        raise ModelError(f"{architecture}: no such architecture in transformers; {advice}")
    unknown = set(dims) - set(ModelDims.__dataclass_fields__)
    if unknown:
        raise ModelError(f"Got unknown sizes {sorted(unknown)} but expected some of {sorted(ModelDims.__dataclass_fields__)}")
    shape = replace(SIZES[size], **dims)
    fields = {**_llama_fields(shape), **_recipe(architecture, shape), **(config or {})}
    try:
        made = AutoConfig.for_model(architecture, **fields)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(f"{architecture}: transformers refuses these sizes: {_first_line(error)}") from error
    if made.get_text_config() is not made:
        raise ModelError(f"{architecture}: a family of models, not a decoder; try {architecture}_text")
    return made


def check_served(architecture: str) -> None:
    """Make a tiny model of this architecture, load it as an instance would, and forget it.

    Raises:
        ModelError: no such architecture, or why no model of it can be served.
    """
    with TemporaryDirectory() as folder:
        make_model(folder, architecture)
        try:
            load_model(folder)
        except ModelError as error:
            said = str(error).removeprefix(folder).removeprefix(f" ({architecture})").removeprefix(": ")
            raise ModelError(f"{architecture}: cannot be served: {said}") from error


def architectures() -> tuple[str, ...]:
    """Those that need more than Llama's field names, or are known to do with them."""
    return tuple(sorted({*_PLAIN, *_recipes(SIZES["tiny"])}))


def fill_weights(model: PreTrainedModel, seed: int) -> None:
    """Overwrite every parameter in place with high-entropy values (see the module's text)."""
    hidden = model.config.get_text_config().hidden_size
    head = model.get_output_embeddings()
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=_generator(seed, name), dtype=torch.float32)
            if head is not None and parameter is head.weight:
                fresh = noise * (_LOGIT_SPREAD / hidden**0.5)
            elif id(parameter) in embeddings:
                fresh = noise * 0.5
            elif parameter.dim() >= 2:
                fresh = noise / hidden**0.5
            else:
                fresh = parameter.float() + noise * 0.1
            parameter.copy_(fresh)


def _first_line(error: Exception) -> str:
    """What transformers says, less the list of everything it knows."""
    return (str(error).splitlines() or [repr(error)])[0][:200]


def _generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))  # torch's CPU generator reads 32 bits


def _positions(config: PretrainedConfig) -> int:
    positions: int = getattr(config, "max_position_embeddings", 2048)  # GPT-2's `n_positions` answers to this name too
    return positions


def _llama_fields(d: ModelDims) -> dict[str, Any]:
    return {
        "vocab_size": d.vocab_size,
        "hidden_size": d.hidden,
        "intermediate_size": d.intermediate,
        "num_hidden_layers": d.layers,
        "num_attention_heads": d.heads,
        "num_key_value_heads": d.kv_heads,
        "head_dim": d.head_dim,
        "max_position_embeddings": d.max_position_embeddings,
        "tie_word_embeddings": False,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "pad_token_id": PAD_ID,
    }


_PLAIN = ("llama", "qwen3", "gemma", "olmo", "olmo2", "smollm3", "seed_oss", "ernie4_5", "helium", "arcee", "exaone4")


def _recipe(architecture: str, d: ModelDims) -> dict[str, Any]:
    return _recipes(d).get(architecture, {})


def _recipes(d: ModelDims) -> dict[str, dict[str, Any]]:
    """What an architecture needs beyond Llama's field names, and settings that make its own arithmetic show."""
    window = d.sliding_window or d.max_position_embeddings
    alternating = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(d.layers)]
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    experts = {"moe_intermediate_size": d.intermediate // 2, "num_experts": d.experts, "num_experts_per_tok": 2}
    routed = {
        "moe_intermediate_size": d.intermediate // 2,
        "n_routed_experts": d.experts,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
    }
    latent = {
        "q_lora_rank": d.hidden // 2,
        "kv_lora_rank": d.hidden // 2,
        "qk_nope_head_dim": d.head_dim,
        "qk_rope_head_dim": d.head_dim // 2,
        "v_head_dim": d.head_dim,
        "num_key_value_heads": d.heads,
        "head_dim": d.head_dim // 2,
    }
    return {
        "qwen2": {"use_sliding_window": False},
        "mistral": {"sliding_window": d.sliding_window},
        "gemma2": {"sliding_window": window, "layer_types": alternating, "query_pre_attn_scalar": d.head_dim},
        "gemma3_text": {
            "sliding_window": window,
            "layer_types": alternating,
            "query_pre_attn_scalar": d.head_dim,
            "rope_parameters": {"sliding_attention": rope, "full_attention": {**rope, "rope_theta": 1e6}},
        },
        "phi3": {"sliding_window": d.sliding_window},
        "opt": {"ffn_dim": d.intermediate, "word_embed_proj_dim": d.hidden, "dropout": 0.0},
        "gpt2": {"n_positions": d.max_position_embeddings, "n_inner": d.intermediate},
        "mixtral": {"num_local_experts": d.experts, "num_experts_per_tok": 2, "sliding_window": d.sliding_window},
        "qwen2_moe": {**experts, "shared_expert_intermediate_size": d.intermediate},
        "qwen3_moe": experts,
        "olmoe": {"num_experts": d.experts, "num_experts_per_tok": 2},
        "granite": {"embedding_multiplier": 2.0, "logits_scaling": 0.5, "residual_multiplier": 0.7, "attention_multiplier": 0.2},
        "cohere": {"logit_scale": 0.5},
        "cohere2": {"logit_scale": 0.5, "sliding_window": window, "layer_types": alternating},
        "starcoder2": {"sliding_window": d.sliding_window},
        "gpt_oss": {
            "num_local_experts": d.experts,
            "num_experts_per_tok": 2,
            "sliding_window": window,
            "layer_types": alternating,
        },
        "deepseek_v2": {**routed, **latent},
        "deepseek_v3": {**routed, **latent},
        "glm4_moe": routed,
        "dots1": {**routed, "sliding_window": window, "layer_types": alternating},
    }
