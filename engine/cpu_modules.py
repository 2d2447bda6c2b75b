"""Faster equivalents for the modules of a `transformers` decoder on a CPU.

`accelerate_for_cpu` walks a loaded bf16 model and swaps what it recognises by structure and behaviour, never by the model's
name. Every swap is proved at swap time: old and new module run on random input, and a replacement that does not agree within
bf16's rounding is dropped. A model in float32 is left alone, so its tokens stay those of `transformers`.

What is swapped, and why it is slow otherwise:
- `nn.Linear`: oneDNN reorders the weight on every call; here it is reordered once (as inductor's weight freezing does).
- A gated MLP, `down(act(gate(x)) * up(x))`: activation and product ride on the two matrix products.
- RMS norms and rotary embeddings: a handful of passes over memory each; here one (`cpu_ops.cpp`).

Modules keep running `transformers`' own code around them; nothing outside the given model changes.
"""

from __future__ import annotations

import ctypes
import math
import types
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from engine.native_library import NativeBuildError, load

SOURCE = Path(__file__).with_name("cpu_ops.cpp")
ROTARY = "apply_rotary_pos_emb"
TOLERANCE = 2.0**-6
"""Largest difference allowed at swap time, as a share of the largest output: four roundings of bf16."""


class PackedLinear(nn.Module):
    """`nn.Linear` in bf16 whose weight lies as oneDNN's kernels want it.

    The plain weight is dropped, so memory is not doubled; `weight` unpacks a copy on demand. Where the weight is shared
    (an output head tied to the embedding) it lives on in the module it is shared with.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    @property
    def weight(self) -> torch.Tensor:
        """`[out_features, in_features]`, unpacked: a copy."""
        dense: torch.Tensor = self.packed.to_dense()
        return dense

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.then(x, "none")

    def then(self, x: torch.Tensor, operation: str, variant: str = "") -> torch.Tensor:
        """`operation(linear(x))`, where `operation` is one of oneDNN's unary post-operations."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, operation, [], variant)
        return out

    def times(self, x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        """`linear(x) * other`."""
        out: torch.Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.packed, self.bias, "mul")
        return out

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


class GatedMLP(nn.Module):
    """`down_proj(act(gate_proj(x)) * up_proj(x))` over packed projections. `activation` is oneDNN's name and variant."""

    def __init__(self, gate: PackedLinear, up: PackedLinear, down: PackedLinear, activation: tuple[str, str]) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down
        self.activation = activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gated = self.gate_proj.then(x, *self.activation)
        return self.down_proj.forward(self.up_proj.times(x, gated))


class FusedRMSNorm(nn.Module):
    """`x / sqrt(mean(x^2) + eps) * scale` over the last dimension, in bf16 with fp32 sums.

    `round_first` rounds the quotient before it is scaled, as Llama's norm does and Gemma's does not. `scale` is the norm's
    weight, or one more than it, in fp32.
    """

    def __init__(self, weight: nn.Parameter, scale: torch.Tensor, eps: float, round_first: bool) -> None:
        super().__init__()
        self.weight = weight
        self.scale = scale  # no buffer: `model.to(dtype)` must not touch it
        self.eps, self.round_first = eps, round_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        size = x.shape[-1]
        pointers = x.data_ptr(), self.scale.data_ptr(), out.data_ptr()
        _operations().hetserve_rms_norm(*pointers, x.numel() // size, size, self.eps, self.round_first, torch.get_num_threads())
        return out


def accelerate_for_cpu(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Swap the slow modules of `model`, in place, for faster ones that were seen to agree with them.

    Args:
        model: a `transformers` decoder, loaded, in eval mode, on the CPU.
        dtype: what it computes in; anything but bfloat16 is left alone.

    Returns:
        How many modules of each kind were swapped: `{"linear": 85, "gated_mlp": 12, "rms_norm": 25, "rotary": 12}`.
    """
    swapped: Counter[str] = Counter()
    if dtype != torch.bfloat16:
        return dict(swapped)
    with torch.inference_mode(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported():  # type: ignore[no-untyped-call]
            swapped["linear"] = _replace(model, _packed_linear)
            swapped["gated_mlp"] = _replace(model, _gated_mlp)
        if _can_compile():
            swapped["rms_norm"] = _replace(model, _fused_norm)
            swapped["rotary"] = sum(map(_fuse_rotary, model.modules()))
    return {kind: count for kind, count in swapped.items() if count}


def _replace(model: nn.Module, make: Callable[[nn.Module], nn.Module | None]) -> int:
    """Put `make(child)` in the place of every submodule for which it returns one; a shared submodule stays shared."""
    made: dict[int, tuple[nn.Module, nn.Module | None]] = {}
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children() would skip repetitions
            if child is None:
                continue
            if id(child) not in made:
                made[id(child)] = child, make(child)
            replacement = made[id(child)][1]
            if replacement is not None:
                replacement.train(child.training)
                setattr(parent, name, replacement)
                count += 1
    return count


def _packed_linear(module: nn.Module) -> nn.Module | None:
    if type(module) is not nn.Linear or not _is_plain(module) or module.weight.dtype != torch.bfloat16:
        return None
    packed = PackedLinear(module)
    return packed if _difference(module, packed, module.in_features) <= TOLERANCE else None


def _gated_mlp(module: nn.Module) -> nn.Module | None:
    children = dict(module.named_children())
    names = ("gate_proj", "up_proj", "down_proj")
    if not _is_plain(module) or any(True for _ in module.parameters(recurse=False)):
        return None
    gate, up, down = (children.pop(name, None) for name in names)
    if not isinstance(gate, PackedLinear) or not isinstance(up, PackedLinear) or not isinstance(down, PackedLinear):
        return None
    if len(children) > 1:  # more than the activation
        return None
    candidates = [GatedMLP(gate, up, down, activation) for activation in (("swish", ""), ("gelu", "tanh"), ("gelu", "none"))]
    return _closest(module, candidates, gate.in_features, TOLERANCE)


def _fused_norm(module: nn.Module) -> nn.Module | None:
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = getattr(module, "weight", None)
    if not type(module).__name__.endswith("RMSNorm") or not isinstance(eps, float) or not isinstance(weight, nn.Parameter):
        return None
    if not _is_plain(module) or weight.dtype != torch.bfloat16 or weight.dim() != 1:
        return None
    scales = [weight.detach().float() + offset for offset in (0.0, 1.0)]
    candidates = [FusedRMSNorm(weight, scale, eps, round_first) for scale in scales for round_first in (True, False)]
    return _closest(module, candidates, weight.shape[0], TOLERANCE / 2)


def _fuse_rotary(module: nn.Module) -> bool:
    """Give one attention module's `forward` a faster `apply_rotary_pos_emb`: the same code over other globals."""
    forward = type(module).forward
    if not isinstance(forward, types.FunctionType) or ROTARY not in forward.__code__.co_names or "forward" in vars(module):
        return False
    original = forward.__globals__.get(ROTARY)
    if original is None or not _rotates_halves(original):
        return False
    names = {**forward.__globals__, ROTARY: _fused_rotary(original)}
    rebound = types.FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    module.forward = types.MethodType(rebound, module)
    return True


Rotary = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@cache
def _rotates_halves(original: Rotary) -> bool:
    query, key = (torch.randn(1, 3, heads, 16, dtype=torch.bfloat16).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(1, 3, 16, dtype=torch.bfloat16) for _ in range(2))
    try:
        wanted = original(query, key, cos, sin)
    except (TypeError, RuntimeError, ValueError):
        return False
    return all(torch.equal(a, b) for a, b in zip(wanted, _fused_rotary(original)(query, key, cos, sin), strict=True))


@cache
def _fused_rotary(original: Rotary) -> Rotary:
    """`original(query, key, cos, sin)` in one pass for `query[1, heads, T, dim]` in bf16; other calls go to `original`."""

    def rotary(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        shapes_fit = not args and not kwargs and cos.dim() == 3 and cos.shape[0] == 1 and cos.dtype == torch.bfloat16
        if not shapes_fit or not (_rotatable(query, cos) and _rotatable(key, cos)):
            return original(query, key, cos, sin, *args, **kwargs)
        cos, sin = cos.contiguous(), sin.contiguous()
        return _rotate(query, cos, sin), _rotate(key, cos, sin)

    return rotary


def _rotatable(x: torch.Tensor, cos: torch.Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.dim() == 4 and x.shape[0] == 1 and x.shape[2:] == cos.shape[1:] and x.stride(3) == 1


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    _, heads, tokens, size = x.shape
    out = torch.empty((1, tokens, heads, size), dtype=x.dtype)
    source = x.data_ptr(), x.stride(2), x.stride(1)
    pointers = cos.data_ptr(), sin.data_ptr(), out.data_ptr()
    _operations().hetserve_rotate(*source, *pointers, tokens, heads, size, torch.get_num_threads())
    return out.transpose(1, 2)


def _is_plain(module: nn.Module) -> bool:
    """No hooks, no parametrisation, no tensor subclass (a sharded weight, say), and everything on the CPU."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    return not any(hooks) and not hasattr(module, "parametrizations") and all(_is_plain_tensor(t) for t in _tensors(module))


def _is_plain_tensor(tensor: torch.Tensor) -> bool:
    return type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu"


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters(recurse=False)
    yield from module.buffers(recurse=False)


def _closest(old: nn.Module, candidates: Sequence[nn.Module], size: int, tolerance: float) -> nn.Module | None:
    """The candidate nearest to `old`, if it is within the tolerance."""
    differences = [_difference(old, candidate, size) for candidate in candidates]
    best = min(differences)
    return candidates[differences.index(best)] if best <= tolerance else None


def _difference(old: nn.Module, new: nn.Module, size: int) -> float:
    """Largest difference of the two on random bf16 `[4, size]`, as a share of the largest output; infinite if they differ in
    kind. Small inputs tell one epsilon from another, large ones a clamp."""
    worst = 0.0
    for magnitude in (1e-3, 1.0, 50.0):
        x = (magnitude * torch.randn(4, size)).to(torch.bfloat16)
        try:
            wanted, got = old(x), new(x)
        except (RuntimeError, TypeError, ValueError):
            return math.inf
        if not isinstance(wanted, torch.Tensor) or wanted.shape != got.shape or wanted.dtype != got.dtype:
            return math.inf
        largest = max(float(wanted.float().abs().max()), torch.finfo(torch.bfloat16).tiny)
        difference = float((wanted.float() - got.float()).abs().max()) / largest
        worst = max(worst, difference if math.isfinite(difference) else math.inf)
    return worst


def _can_compile() -> bool:
    try:
        load(SOURCE)
    except NativeBuildError:
        return False
    return True


@cache
def _operations() -> ctypes.CDLL:
    library = load(SOURCE)
    pointer, integer = ctypes.c_void_p, ctypes.c_int64
    library.hetserve_rms_norm.argtypes = [pointer] * 3 + [integer] * 2 + [ctypes.c_float, ctypes.c_int, ctypes.c_int]
    library.hetserve_rms_norm.restype = None
    library.hetserve_rotate.argtypes = [pointer] + [integer] * 2 + [pointer] * 3 + [integer] * 3 + [ctypes.c_int]
    library.hetserve_rotate.restype = None
    return library
