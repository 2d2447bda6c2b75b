"""A real model for an instance. Apart from `instance.loaded_model` because importing it imports torch and transformers."""

from __future__ import annotations

import time

import msgspec
import torch

from core.cost import CostModel, roofline
from core.hardware import ACCELERATORS
from engine.torch_runner import TorchRunner
from instance.loaded_model import LoadedModel
from instance.spec import InstanceSpec
from kv_transfer.tensor_store import TensorStore


def torch_model(spec: InstanceSpec) -> LoadedModel:
    """Load the configured model on the instance's device.

    Raises:
        ModelError, ConfigError: see `TorchRunner.load`.
    """
    torch.set_num_threads(spec.threads)
    began_s = time.perf_counter()
    engine = spec.engine.model_copy(update={"threads": spec.threads})
    config = spec.config
    runner = TorchRunner.load(config.model, engine, dtype=config.dtype, device=spec.device, max_model_len=config.max_model_len)
    store = TensorStore([(layer.key, layer.value) for layer in runner.layers], runner.layout)
    return LoadedModel(
        runner=runner,
        store=store,
        fingerprint=runner.fingerprint,
        cost=_cost(spec, runner),
        bind_thread=lambda: torch.set_num_threads(spec.threads),
        seconds={"model": time.perf_counter() - began_s},
    )


def _cost(spec: InstanceSpec, runner: TorchRunner) -> CostModel:
    """A roofline for the accelerator, with the coefficients that the pool's configuration gives in their place."""
    device = ACCELERATORS.get(spec.accelerator, ACCELERATORS["CPU" if spec.device == "cpu" else "A10G"])
    return msgspec.structs.replace(roofline(runner.shape, device), **(spec.config.pools[spec.pool].cost or {}))
