"""Reads off a loaded decoder what each of its attention layers asks for, by watching one tiny forward pass.

Config fields differ from one architecture to the next; what reaches the attention call does not. For the forward pass two
recording functions stand in for transformers' own: one for attention (head counts, scale, soft cap, sinks) and one for masks,
whose *mask function* is then asked which keys a far-away query sees. So windows, chunks and two-sided attention are
found where the model defines them.

Whatever the paged cache could not reproduce is refused with a `ModelError` that names the model and the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from core.errors import ModelError
from engine.attention.base import LayerSpec

PROBE_NAME = "hetserve_probe"

_FAR_TOKENS = 1 << 17
_TOKENS = 3
_HARMLESS = {
    *("scaling", "dropout", "sliding_window", "softcap", "s_aux", "paged", "is_causal", "deterministic"),
    *("position_ids", "position_embeddings", "cache_position", "use_cache", "past_key_values", "output_attentions"),
    *("output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep", "num_logits_to_keep"),
    *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "token_type_ids", "input_ids"),
}

MaskFunction = Callable[..., torch.Tensor]


@dataclass(frozen=True)
class _Call:
    """One attention call as it arrived. The key is kept alive so that layers which share one can be told."""

    layer_index: int
    query_heads: int
    key: torch.Tensor
    value_dim: int
    mask: MaskFunction | None
    options: dict[str, Any]


class _Recorder:
    """Stands in for attention and masks during one forward pass."""

    def __init__(self) -> None:
        self.calls: list[_Call] = []
        self.problem: str | None = None
        self._masks: dict[int, MaskFunction] = {}
        self._alive: list[torch.Tensor] = []

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        *args: Any,
        mask_function: MaskFunction | None = None,
        device: torch.device | str = "cpu",
        **_: Any,
    ) -> torch.Tensor:
        """A mask of the usual shape that remembers the function it stands for."""
        mask = torch.ones(batch_size, 1, q_length, kv_length, dtype=torch.bool, device=device).tril()
        if mask_function is not None:
            self._masks[mask.untyped_storage().data_ptr()] = mask_function
        self._alive.append(mask)
        return mask

    def attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        index = getattr(module, "layer_idx", None)
        if options.get("paged") is not self:
            self._object("does not hand extra arguments down to its attention")
        elif not isinstance(index, int):
            self._object(f"attention module {type(module).__name__} does not know its layer")
        else:
            known = None if attention_mask is None else self._masks.get(attention_mask.untyped_storage().data_ptr())
            if attention_mask is not None and known is None:
                self._object("changes its attention mask in a way of its own (a bias or a learned mask)")
            self.calls.append(_Call(index, query.shape[1], key, value.shape[3], known, options))
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None

    def _object(self, problem: str) -> None:
        self.problem = self.problem or problem


def probe_attention(model: PreTrainedModel, name: str) -> tuple[LayerSpec, ...]:
    """One `LayerSpec` per decoder layer, in order.

    Leaves the model's attention implementation set to `PROBE_NAME`; the caller sets the one it wants.

    Raises:
        ModelError: the model's attention is not plain causal attention, each layer once, with a window at most.
    """
    text = model.config.get_text_config()
    recorder = _Recorder()
    AttentionInterface.register(PROBE_NAME, recorder.attention)
    AttentionMaskInterface.register(PROBE_NAME, recorder.mask)
    device = next(model.parameters()).device
    tokens = torch.arange(1, _TOKENS + 1, device=device)[None] % text.vocab_size
    try:
        model.set_attn_implementation(PROBE_NAME)
        with torch.inference_mode():
            positions = torch.arange(_TOKENS, device=device)[None]
            model(input_ids=tokens, position_ids=positions, use_cache=False, paged=recorder)
    except (ValueError, TypeError, AttributeError, RuntimeError, IndexError, KeyError, NotImplementedError) as error:
        raise ModelError(f"{name}: cannot run with attention of our own: {error}") from error
    if recorder.problem is not None:
        raise ModelError(f"{name}: {recorder.problem}")
    _check_layers(recorder.calls, text.num_hidden_layers, name)
    far = max(_FAR_TOKENS, 2 * (getattr(text, "max_position_embeddings", None) or 0))
    return tuple(_spec(call, far, name) for call in sorted(recorder.calls, key=lambda call: call.layer_index))


def _check_layers(calls: list[_Call], layers: int, name: str) -> None:
    seen = sorted(call.layer_index for call in calls)
    if seen != list(range(layers)):
        raise ModelError(
            f"{name}: attention was called for layers {seen} but expected each of {layers} layers once "
            "(a hybrid with other kinds of layers, or one that calls attention otherwise)"
        )
    if len({call.key.data_ptr() for call in calls}) != len(calls):
        raise ModelError(f"{name}: layers share keys and values with one another")


def _spec(call: _Call, far: int, name: str) -> LayerSpec:
    where = f"{name}: layer {call.layer_index}"
    strange = {k for k, v in call.options.items() if k not in _HARMLESS and v is not None and v is not False}
    if strange:
        raise ModelError(f"{where} gives its attention arguments that change the result: {sorted(strange)}")
    if call.options.get("is_causal") is False or call.mask is None:
        raise ModelError(f"{where} does not ask for causal attention")
    scale = call.options.get("scaling")
    return LayerSpec(
        layer_index=call.layer_index,
        query_heads=call.query_heads,
        kv_heads=call.key.shape[1],
        key_dim=call.key.shape[3],
        value_dim=call.value_dim,
        scale=float(call.key.shape[3] ** -0.5 if scale is None else scale),
        sliding_window=_window(call.mask, far, where),
        softcap=call.options.get("softcap"),
        has_sinks=call.options.get("s_aux") is not None,
    )


def _window(mask: MaskFunction, far: int, where: str) -> int | None:
    """How many tokens back, itself included, a token sees; None where it sees them all. Asked at position `far`."""
    widths = []
    for query in (far - 1, far - 1 - far // 3):
        seen = _visible(mask, query, where)
        width = int(seen.sum())
        if bool(seen[query + 1 :].any()):
            raise ModelError(f"{where} attends to later tokens (bidirectional attention)")
        if width == 0 or not bool(seen[query + 1 - width : query + 1].all()):
            raise ModelError(f"{where} attends to a set of tokens that is not the most recent ones")
        widths.append(None if width == query + 1 else width)
    if widths[0] != widths[1]:
        raise ModelError(f"{where} attends in chunks: how far back a token sees depends on its position")
    return widths[0]


def _visible(mask: MaskFunction, query: int, where: str) -> torch.Tensor:
    keys = torch.arange(query + 2)[None, None, None]
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.long)
    try:
        seen = mask(zero, zero, zero + query, keys)
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        raise ModelError(f"{where} has an attention mask that depends on more than positions: {error}") from error
    return torch.broadcast_to(torch.as_tensor(seen), keys.shape).flatten()
