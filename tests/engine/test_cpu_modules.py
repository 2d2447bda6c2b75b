"""Swapped modules compute what they replace; what cannot be proved equal stays."""

from __future__ import annotations

import copy
import shutil
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from engine.cpu_modules import FusedRMSNorm, GatedMLP, PackedLinear, accelerate_for_cpu

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
    "pad_token_id": 0,
}
BF16 = torch.bfloat16

pytestmark = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported() or shutil.which("c++") is None, reason="needs oneDNN's bf16 and a compiler"
)


def tiny(model: type[PreTrainedModel] = LlamaForCausalLM, config: Any = LlamaConfig, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return model(config(**SIZES, **options)).to(BF16).eval()


def logits(model: PreTrainedModel, dtype: torch.dtype = BF16) -> torch.Tensor:
    ids = torch.arange(24)[None] * 7 % 256
    with torch.inference_mode():
        return model.to(dtype)(ids, use_cache=False).logits.float()


@pytest.mark.parametrize(
    ("model", "config", "options", "expected"),
    [
        (LlamaForCausalLM, LlamaConfig, {}, {"linear": 15, "gated_mlp": 2, "rms_norm": 5, "rotary": 2}),
        (
            Qwen2ForCausalLM,
            Qwen2Config,
            {"tie_word_embeddings": True},
            {"linear": 15, "gated_mlp": 2, "rms_norm": 5, "rotary": 2},
        ),
        (Qwen3ForCausalLM, Qwen3Config, {}, {"linear": 15, "gated_mlp": 2, "rms_norm": 9, "rotary": 2}),
        (Gemma3ForCausalLM, Gemma3TextConfig, {}, {"linear": 15, "gated_mlp": 2, "rms_norm": 13, "rotary": 2}),
        (MixtralForCausalLM, MixtralConfig, {}, {"linear": 9, "rms_norm": 5, "rotary": 2}),
        (GlmForCausalLM, GlmConfig, {}, {"linear": 13, "rms_norm": 5}),
    ],
)
def test_a_swapped_model_is_as_near_to_float32_as_the_original(
    model: type[PreTrainedModel], config: Any, options: dict[str, Any], expected: dict[str, int]
) -> None:
    original = tiny(model, config, **options)
    swapped = copy.deepcopy(original)
    assert accelerate_for_cpu(swapped, BF16) == expected
    before, after = logits(original), logits(swapped)
    exact = logits(original, torch.float32)
    assert (after - exact).abs().mean() <= 1.2 * (before - exact).abs().mean()


def test_a_float32_model_is_left_alone() -> None:
    model = tiny().float()
    assert accelerate_for_cpu(model, torch.float32) == {}
    assert not any(isinstance(module, PackedLinear | FusedRMSNorm | GatedMLP) for module in model.modules())


def test_other_models_keep_their_rotary_function() -> None:
    original = modeling_llama.apply_rotary_pos_emb
    untouched, swapped = tiny(), tiny()
    before = logits(untouched)
    accelerate_for_cpu(swapped, BF16)
    assert modeling_llama.apply_rotary_pos_emb is original
    assert torch.equal(logits(untouched), before)


def test_a_packed_linear_frees_its_weight_and_can_unpack_it() -> None:
    linear = nn.Linear(48, 80).to(BF16)
    packed = PackedLinear(linear)
    assert torch.equal(packed.weight, linear.weight)
    assert "weight" not in dict(packed.named_parameters())


def test_tied_embeddings_survive() -> None:
    model = tiny(Qwen2ForCausalLM, Qwen2Config, tie_word_embeddings=True)
    embedding = model.get_input_embeddings()
    accelerate_for_cpu(model, BF16)
    assert torch.equal(model.get_output_embeddings().weight, embedding.weight)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 3, 64)])
def test_a_packed_linear_takes_every_shape(shape: tuple[int, ...]) -> None:
    linear = nn.Linear(64, 32).to(BF16)
    x = torch.randn(shape).to(BF16)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=2e-2, rtol=2e-2)


def test_a_norm_of_other_arithmetic_is_left_alone() -> None:
    class CenteredRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = CenteredRMSNorm(64).to(BF16)

    assert accelerate_for_cpu(Outer(), BF16) == {}


def test_an_mlp_of_other_arithmetic_is_left_alone() -> None:
    class ClampedMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
            self.down_proj, self.act_fn = nn.Linear(96, 64, bias=False), nn.SiLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7.0) * self.up_proj(x))
            return out

    assert accelerate_for_cpu(nn.Sequential(ClampedMLP()).to(BF16), BF16) == {"linear": 3}


def test_a_hooked_module_is_left_alone() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).to(BF16)
    model[0].register_forward_hook(lambda *_: None)
    assert accelerate_for_cpu(model, BF16) == {"linear": 1}
    assert type(model[0]) is nn.Linear


def test_a_shared_module_stays_shared() -> None:
    shared = nn.Linear(64, 64).to(BF16)
    model = nn.ModuleDict({"first": shared, "second": shared})
    accelerate_for_cpu(model, BF16)
    assert isinstance(model["first"], PackedLinear)
    assert model["first"] is model["second"]
