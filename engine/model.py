"""Loads any decoder that `transformers` can serve through its attention interface, from a local folder or a hub id.

The model keeps its own modelling code; this file decides whether the engine can serve it exactly, and reads off what the
engine needs: attention layers, context length, end tokens, a fingerprint. What cannot be served is refused by name and
reason, before the weights are read wherever that can be told from the config.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from core.cost import ModelShape
from core.errors import ConfigError, ModelError
from engine.attention.base import LayerSpec
from engine.probe import probe_attention

_SERVED_LAYER_TYPES = {"full_attention", "sliding_attention"}
_VOLATILE_CONFIG = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "_attn_implementation"}
_SAMPLED_ELEMENTS = 16


@dataclass(frozen=True)
class LoadedModel:
    """A decoder on its device, ready to be given the engine's attention.

    Attributes:
        layers: what each attention layer asks for, in order.
        keeps_logits: `forward` takes `logits_to_keep` as a tensor of row indexes.
        fingerprint: equal for two loads of the same weights in the same dtype, whatever the device.
        shape: sizes for the cost model.
    """

    name: str
    model: PreTrainedModel
    layers: tuple[LayerSpec, ...]
    dtype: torch.dtype
    device: torch.device
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    keeps_logits: bool
    fingerprint: str
    shape: ModelShape


def load_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    max_model_len: int | None = None,
) -> LoadedModel:
    """Load a decoder and check that it can be served.

    Args:
        source: a folder with `config.json` and safetensors, or a hub id.
        dtype: `auto` keeps the checkpoint's (on CPU, bfloat16 in place of float16).
        max_model_len: in tokens; None takes all that the model has positions for.

    Raises:
        ModelError: not a model, or one that the paged cache could not serve exactly; says which and why.
        ConfigError: `max_model_len` is more than the model has positions for.
    """
    name, device = str(source), torch.device(device)
    config = read_config(source)
    length = _context_length(config.get_text_config(), max_model_len, name)
    torch_dtype = _dtype(config, dtype, device)
    model = _load_weights(name, config, torch_dtype, device)
    layers = tuple(_within(spec, length) for spec in probe_attention(model, name))
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{name}: has no output head over its vocabulary")
    return LoadedModel(
        name=name,
        model=model,
        layers=layers,
        dtype=torch_dtype,
        device=device,
        max_model_len=length,
        vocab_size=int(head.weight.shape[0]),
        eos_token_ids=_eos_ids(model),
        keeps_logits="logits_to_keep" in inspect.signature(model.forward).parameters,
        fingerprint=_fingerprint(model, torch_dtype),
        shape=_shape(model, layers, torch_dtype),
    )


def _within(spec: LayerSpec, tokens: int) -> LayerSpec:
    """The same layer, without a window that no context outgrows."""
    return spec if spec.sliding_window is None or spec.sliding_window < tokens else replace(spec, sliding_window=None)


def read_config(source: str | Path) -> PretrainedConfig:
    """The model's config, once it is clear that the model may be served. Reads no weights. Raises ModelError."""
    name = str(source)
    if not Path(source).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise ModelError(f"{name}: no such folder")
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ModelError(f"{name}: not a model folder (no config.json)")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{name}: cannot read its config: {error}") from error
    refusal = _refusal(config)
    if refusal is not None:
        raise ModelError(f"{name} ({config.model_type}): {refusal}")
    return config


def _refusal(config: PretrainedConfig) -> str | None:
    """Why a model of this config cannot be served, where that can be told without its weights."""
    if config.is_encoder_decoder:
        return "an encoder-decoder; only decoders are served"
    try:
        model_class = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError:
        return "transformers has no decoder that generates text for it"
    if getattr(model_class, "_is_stateful", False):
        return "keeps state outside its attention (a state-space, recurrent or hybrid model)"
    if not getattr(model_class, "_supports_attention_backend", False):
        return f"{model_class.__name__} does not support transformers' attention interface"
    text = config.get_text_config()
    strange = set(getattr(text, "layer_types", None) or ()) - _SERVED_LAYER_TYPES
    if strange:
        return f"has layers of kinds that are not served: {sorted(strange)}"
    if getattr(text, "num_kv_shared_layers", 0):
        return "layers share keys and values with one another"
    return None


def _load_weights(name: str, config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    placement: dict[str, Any] = {} if device.type == "cpu" else {"device_map": {"": device}}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            name, config=config, dtype=dtype, trust_remote_code=False, output_loading_info=True, **placement
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        raise ModelError(f"{name}: cannot load its weights: {error}") from error
    absent = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if absent:
        raise ModelError(f"{name}: {len(absent)} weights are missing or of the wrong shape, for instance {absent[0]}")
    model.eval()
    loaded: PreTrainedModel = model
    return loaded


def _dtype(config: PretrainedConfig, wanted: str, device: torch.device) -> torch.dtype:
    if wanted != "auto":
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    own = getattr(config.get_text_config(), "dtype", None) or getattr(config, "dtype", None) or torch.float32
    own = getattr(torch, own) if isinstance(own, str) else own
    return torch.bfloat16 if own == torch.float16 and device.type == "cpu" else own


def _context_length(text: PretrainedConfig, wanted: int | None, name: str) -> int:
    longest: int | None = getattr(text, "max_position_embeddings", None)
    for rope in _ropes(text):
        if rope.get("rope_type") == "longrope":
            # Past this length the frequencies of *all* tokens change, also of those in the cache and in the batch.
            original = rope.get("original_max_position_embeddings")
            longest = min(filter(None, (longest, original)), default=None)
    if longest is not None and wanted is not None and wanted > longest:
        raise ConfigError(f"Got {wanted} but {name} has positions for {longest} tokens", "max_model_len")
    length = wanted or longest
    if length is None:
        raise ModelError(f"{name}: its config does not say how many positions it has; set max_model_len")
    return length


def _ropes(text: PretrainedConfig) -> Iterable[dict[str, Any]]:
    """The rope settings, whether there is one set or one per kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    if ids is None:
        ids = getattr(model.config.get_text_config(), "eos_token_id", None)
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)


def _fingerprint(model: PreTrainedModel, dtype: torch.dtype) -> str:
    """Hash of the config, the dtype, and a few elements of every weight, so that two fine-tunings of one model differ."""
    config = {k: v for k, v in model.config.to_dict().items() if k not in _VOLATILE_CONFIG}
    digest = hashlib.sha256(json.dumps([config, str(dtype)], sort_keys=True, default=str).encode())
    samples = []
    with torch.inference_mode():
        for name, weight in sorted(model.state_dict().items()):
            digest.update(f"{name}{tuple(weight.shape)}".encode())
            flat = weight.detach().reshape(-1)
            samples.append(flat[:: max(1, flat.numel() // _SAMPLED_ELEMENTS)][:_SAMPLED_ELEMENTS].float())
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def _shape(model: PreTrainedModel, layers: tuple[LayerSpec, ...], dtype: torch.dtype) -> ModelShape:
    text = model.config.get_text_config()
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    experts = experts or getattr(text, "n_routed_experts", None) or 1
    share = min(1.0, (getattr(text, "num_experts_per_tok", None) or experts) / experts)
    inputs, head = model.get_input_embeddings(), model.get_output_embeddings()
    active = 0.0
    for weight in model.parameters():
        if weight is inputs.weight and weight is not head.weight:
            continue  # one row of it is read
        active += weight.numel() * (share if weight.dim() == 3 and weight.shape[0] == experts else 1.0)
    kv_elements = sum(spec.kv_heads * (spec.key_dim + spec.value_dim) for spec in layers)
    return ModelShape(
        parameters=int(active),
        layers=len(layers),
        query_heads=max(spec.query_heads for spec in layers),
        head_dim=max(spec.key_dim for spec in layers),
        kv_bytes_per_token=kv_elements * dtype.itemsize,
        weight_bytes=sum(weight.numel() * weight.element_size() for weight in model.parameters()),
    )
