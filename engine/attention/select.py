"""Which attention backend serves a model on a device: the first, in order of speed, that refuses none of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from core.errors import ConfigError
from engine.attention.base import AttentionBackend, LayerSpec
from engine.attention.cpu import CpuAttention
from engine.attention.flash import FlashAttention
from engine.attention.sdpa import SdpaAttention
from engine.attention.varlen import VarlenAttention


@dataclass(frozen=True)
class Selection:
    """The backend chosen, and why each one preferred to it was refused: `(name, reason)`."""

    backend: AttentionBackend
    refused: tuple[tuple[str, str], ...] = ()


def default_backends() -> tuple[AttentionBackend, ...]:
    """Every backend, best first."""
    return (FlashAttention(), VarlenAttention(), CpuAttention(), SdpaAttention())


def select(
    wanted: str,
    specs: Sequence[LayerSpec],
    dtype: torch.dtype,
    device: torch.device,
    *,
    block_size: int | None = None,
    backends: Sequence[AttentionBackend] | None = None,
) -> Selection:
    """The backend called `wanted`, or for `auto` the best one that serves every layer.

    Args:
        block_size: tokens per block, where that is not the backend's to choose.
        backends: those to choose from, best first; None takes `default_backends()`.

    Raises:
        ConfigError: no backend of that name, or it refuses a layer or the block size; the message carries its reason.
    """
    backends = default_backends() if backends is None else backends
    named = [backend for backend in backends if wanted in ("auto", backend.name)]
    refused: list[tuple[str, str]] = []
    for backend in named:
        reason = next((r for spec in specs if (r := backend.unsupported(spec, dtype, device)) is not None), None)
        if reason is None and block_size is not None and block_size % backend.block_size_multiple:
            reason = f"block_size {block_size} is not a multiple of {backend.block_size_multiple}"
        if reason is None:
            return Selection(backend, tuple(refused))
        refused.append((backend.name, reason))
    reasons = "; ".join(f"{name}: {reason}" for name, reason in refused)
    known = [backend.name for backend in backends]
    raise ConfigError(reasons or f"Got {wanted!r} but expected auto or one of {known}", "engine.attention")
