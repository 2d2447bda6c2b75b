"""What loads, what is refused by name and reason, and what is read off a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from core.config import EngineConfig
from core.errors import ConfigError, ModelError
from engine.attention.select import select
from engine.kv_cache import allocate, layout_of
from engine.model import load_model, read_config
from engine.self_check import CHECK_TOKENS, check_against, reference_logits
from engine.torch_runner import TorchRunner


def bare_config(folder: Path, model_type: str, **fields: Any) -> Path:
    """A folder that has a config and no weights: enough for what is refused before the weights are read."""
    folder.mkdir(exist_ok=True)
    AutoConfig.for_model(model_type, **fields).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("model_type", "fields", "reason"),
    [
        ("t5", {}, "encoder-decoder"),
        ("bart", {}, "encoder-decoder|does not support"),
        ("mamba", {}, "keeps state outside its attention"),
        ("falcon_h1", {}, "keeps state outside its attention"),
        ("qwen3_next", {}, "keeps state outside its attention"),
        ("vit", {}, "no decoder that generates text"),
        ("bloom", {}, "BloomForCausalLM does not support transformers' attention interface"),
        ("gptj", {}, "GPTJForCausalLM does not support transformers' attention interface"),
        ("llama4_text", {}, "chunked_attention"),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}, "conv"),
        ("minimax", {}, "linear_attention"),
        ("gemma3n_text", {}, "layers share keys and values"),
    ],
)
def test_what_cannot_be_served_is_refused_before_its_weights_are_read(tmp_path, model_type, fields, reason):
    folder = bare_config(tmp_path / model_type, model_type, **fields)
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(folder)
    assert model_type in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "reason"),
    [
        ("bert", "later tokens"),
        ("roberta", "later tokens"),
        ("diffllama", "expected each of 2 layers once"),
        ("nemotron", "does not hand extra arguments"),
        ("doge", "mask in a way of its own"),
    ],
)
def test_attention_that_the_cache_cannot_reproduce_is_refused_by_watching_it(model_folder, architecture, reason):
    folder = model_folder(architecture)
    with pytest.raises(ModelError, match=reason) as caught:
        load_model(folder)
    assert str(folder) in str(caught.value)


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match="no such folder"):
        read_config(tmp_path / "absent")
    with pytest.raises(ModelError, match=r"no config\.json"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text("{not json")
    with pytest.raises(ModelError, match="cannot read its config"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "of-my-own"}))
    with pytest.raises(ModelError, match="of-my-own"):
        read_config(tmp_path)


def test_code_that_travels_with_a_model_is_never_run(tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}})
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with pytest.raises(ModelError):
        read_config(tmp_path)
    assert not (tmp_path / "ran").exists()


def copied(folder: Path, target: Path, **changes: Any) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_weights_that_do_not_fit_the_config_are_refused_rather_than_made_up(model_folder, tmp_path):
    more_layers = copied(model_folder("llama"), tmp_path / "more", num_hidden_layers=3)
    with pytest.raises(ModelError, match="weights are missing or of the wrong shape"):
        load_model(more_layers)
    no_weights = copied(model_folder("llama"), tmp_path / "none")
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="cannot load its weights"):
        load_model(no_weights)


def test_truncated_weights_are_refused(model_folder, tmp_path):
    broken = copied(model_folder("llama"), tmp_path / "broken")
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="cannot load its weights"):
        load_model(broken)


def test_layers_are_read_off_the_running_model(model_folder):
    window, capped = load_model(model_folder("gemma2", sliding_window=8)).layers
    assert (window.sliding_window, capped.sliding_window) == (8, None)
    assert window.softcap == capped.softcap == 50.0
    assert (window.query_heads, window.kv_heads, window.key_dim, window.value_dim, window.scale) == (4, 2, 16, 16, 0.25)
    latent = load_model(model_folder("deepseek_v3")).layers[0]
    assert (latent.kv_heads, latent.key_dim, latent.value_dim) == (4, 24, 16)
    assert all(layer.has_sinks for layer in load_model(model_folder("gpt_oss")).layers)


def test_a_window_that_no_context_outgrows_is_none(model_folder):
    folder = model_folder("mistral", sliding_window=64)
    assert load_model(folder).layers[0].sliding_window == 64
    assert load_model(folder, max_model_len=64).layers[0].sliding_window is None


def test_the_context_length_is_the_configs_or_a_smaller_one_asked_for(model_folder):
    folder = model_folder("gpt2")
    assert load_model(folder).max_model_len == 512
    assert load_model(folder, max_model_len=100).max_model_len == 100
    with pytest.raises(ConfigError, match="max_model_len: Got 513"):
        load_model(folder, max_model_len=513)


def test_rope_that_changes_past_a_length_is_served_up_to_that_length(model_folder):
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    folder = model_folder("phi3", config={"rope_parameters": rope, "original_max_position_embeddings": 96})
    assert load_model(folder).max_model_len == 96
    with pytest.raises(ConfigError, match="max_model_len"):
        load_model(folder, max_model_len=97)


def test_end_tokens_come_from_the_generation_config_first(model_folder, tmp_path):
    assert load_model(model_folder("llama")).eos_token_ids == {2}
    several = copied(model_folder("llama"), tmp_path / "several")
    (several / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 9]}))
    assert load_model(several).eos_token_ids == {2, 9}


def test_the_fingerprint_tells_weights_and_dtypes_apart_and_nothing_else(model_folder, tmp_path):
    folder = model_folder("llama")
    same = load_model(copied(folder, tmp_path / "elsewhere")).fingerprint
    assert load_model(folder).fingerprint == same
    assert load_model(model_folder("llama", seed=1)).fingerprint != same
    assert load_model(folder, dtype="bfloat16").fingerprint != same
    assert load_model(copied(folder, tmp_path / "theta", rms_norm_eps=1e-5)).fingerprint != same


def test_auto_keeps_the_checkpoints_dtype_but_for_float16_on_a_cpu(model_folder):
    assert load_model(model_folder("llama")).dtype == torch.float32
    assert load_model(model_folder("llama", dtype="bfloat16")).dtype == torch.bfloat16
    assert load_model(model_folder("llama", dtype="float16")).dtype == torch.bfloat16


def test_the_shape_counts_active_parameters(model_folder):
    dense = load_model(model_folder("llama"))
    every = sum(weight.numel() for weight in dense.model.parameters())
    embedding = dense.model.get_input_embeddings().weight.numel()
    assert dense.shape.parameters == every - embedding
    assert dense.shape.weight_bytes == 4 * every
    assert dense.shape.kv_bytes_per_token == 2 * 2 * (16 + 16) * 4
    sparse = load_model(model_folder("mixtral"))
    experts = sum(w.numel() for w in sparse.model.parameters() if w.dim() == 3)
    assert sparse.shape.parameters == sum(w.numel() for w in sparse.model.parameters()) - embedding - experts // 2


def test_a_model_that_looks_past_its_kv_is_refused_by_the_self_check(model_folder):
    """A layer that mixes in the token before, as a convolution would: right in one piece, wrong in chunks."""
    loaded = load_model(model_folder("llama"))
    loaded.model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + output.roll(1, dims=1))
    expected = reference_logits(loaded)
    layout = layout_of(loaded.layers, loaded.dtype, 8)
    runner = TorchRunner(loaded, select("auto", loaded.layers, loaded.dtype, loaded.device), allocate(layout, 8, loaded.device))
    with pytest.raises(ModelError, match="state that the cache does not hold"):
        check_against(expected, loaded, runner.logits, layout.blocks_for(CHECK_TOKENS), runner.num_groups)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kernel_that_computes_something_else_is_refused_by_the_self_check(model_folder, monkeypatch, dtype):
    from engine.attention.cpu import CpuAttention

    honest = CpuAttention.attend
    monkeypatch.setattr(CpuAttention, "attend", lambda self, query, *rest: honest(self, query * 0.5, *rest))
    with pytest.raises(ModelError, match="differ from its own"):
        TorchRunner.load(model_folder("llama", dtype=dtype), EngineConfig(attention="cpu"))
