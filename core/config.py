"""The one configuration file: what to serve, on which pools, through which door. Read and checked once, at the edge.

    model: /models/llama
    dtype: bfloat16
    gateway: {host: 127.0.0.1, port: 8000}
    pools:
      - {role: prefill, replicas: 1, accelerator: H100, resources: {gpus: 1}}
      - {role: decode, replicas: 3, accelerator: [L40S, A10G], resources: {gpus: 1}}

Unknown keys are errors, and every error names the path of its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from core.cost import CostModel
from core.errors import ConfigError


class Role(Enum):
    """What an instance does: read prompts, write tokens, or both."""

    PREFILL = "prefill"
    DECODE = "decode"
    MIXED = "mixed"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EngineConfig(_Section):
    """One engine's limits.

    Attributes:
        attention: backend name, or `auto` for the best one that the model and device allow.
        block_size: tokens per KV block; None takes the backend's preference.
        kv_bytes: size of the KV cache; None measures: the share `memory_utilization` of the device memory that is free once
            the weights are loaded, less what a step needs.
        max_num_seqs: most sequences in one step.
        max_num_batched_tokens: most tokens in one step; longer prompts are prefilled in chunks of it.
        max_waiting_tokens: prompt tokens that may queue before submissions are refused.
        headroom_tokens: output of each sequence for which admission keeps KV blocks free. More of it and fewer sequences run at
            once; less of it and more are recomputed, because the blocks run out under their output.
        prefix_cache: keep and reuse KV of common prefixes.
        threads: CPU threads for compute; None divides the machine's cores among its instances.
        runner: `torch` runs the model; `simulated` takes the time that `cost` says and makes deterministic tokens.
        accelerate: on CPU, swap modules for faster equivalents at load.
        capture: on CUDA, record decode steps as graphs at load, where the attention backend allows, and replay them. Takes
            memory and some seconds at load, and spares each step the cost of launching its kernels one by one.
    """

    attention: Literal["auto", "cpu", "sdpa", "varlen", "flash"] = "auto"
    block_size: int | None = Field(default=None, ge=1, le=4096)
    kv_bytes: int | None = Field(default=None, ge=1)
    memory_utilization: float = Field(default=0.9, gt=0, le=1)
    max_num_seqs: int = Field(default=64, ge=1, le=65536)
    max_num_batched_tokens: int = Field(default=2048, ge=1, le=1 << 20)
    max_waiting_tokens: int = Field(default=1 << 18, ge=1)
    headroom_tokens: int = Field(default=512, ge=0)
    prefix_cache: bool = True
    threads: int | None = Field(default=None, ge=1)
    runner: Literal["torch", "simulated"] = "torch"
    accelerate: bool = True
    capture: bool = True


Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class ResourceConfig(_Section):
    """What one instance asks Ray for. `custom` are Ray custom resources."""

    gpus: Amount = 0
    cpus: Amount = 0
    custom: dict[str, Amount] = {}


def _names(value: object) -> object:
    """One error for whatever is not a name or a list of names, in place of one for each alternative."""
    if isinstance(value, str) and value:
        return value
    if isinstance(value, list) and value and all(isinstance(name, str) and name for name in value):
        return value
    raise ValueError(f"expected a name or a list of names, got {value!r}")


def _switch(value: object) -> object:
    """YAML reads a bare `off` as false."""
    return "off" if value is False else value


class PoolConfig(_Section):
    """Instances of one role on one kind of accelerator.

    `accelerator` matches Ray's `ray.io/accelerator-type` node label: one name, several, or None for any node.
    Whatever names one other than `CPU` must ask for a GPU, or a part of one: without, it would run on that node's CPU.
    `labels` are further node labels to match. `cost` and `engine` override the cluster's.
    """

    role: Role
    replicas: int = Field(default=1, ge=0, le=4096)
    accelerator: Annotated[str | list[str], BeforeValidator(_names)] | None = None
    labels: dict[str, str] = {}
    resources: ResourceConfig = ResourceConfig()
    engine: EngineConfig | None = None
    cost: dict[str, Amount] | None = None
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9_-]{1,48}$")

    @field_validator("cost")
    @classmethod
    def _known_coefficients(cls, value: dict[str, float] | None) -> dict[str, float] | None:
        unknown = set(value or ()) - set(CostModel.__struct_fields__)
        if unknown:
            raise ValueError(f"unknown coefficients {sorted(unknown)}, expected some of {list(CostModel.__struct_fields__)}")
        return value

    @property
    def names_gpu(self) -> bool:
        """Whether it may be placed on nothing but an accelerator."""
        names = [self.accelerator] if isinstance(self.accelerator, str) else self.accelerator or []
        return bool(names) and "CPU" not in names


class GatewayConfig(_Section):
    """The HTTP door. An `api_key` is required to listen beyond loopback.

    `read_timeout_s` bounds how long a client may take to send one request, `max_connections` how many may be open at once.
    `served_model_name` is what clients call the model, or several such names, of which answers carry the first.
    `generation_config`: `auto` takes sampling defaults from the file of that name in the model's folder, `off` (vLLM's word is
    `vllm`) takes none.
    """

    host: str = "127.0.0.1"
    port: int = Field(default=8000, ge=0, le=65535)
    api_key: str | None = Field(default=None, min_length=8)
    served_model_name: Annotated[str | list[str], BeforeValidator(_names)] | None = None
    generation_config: Annotated[Literal["auto", "off"], BeforeValidator(_switch)] = "auto"
    max_n: int = Field(default=16, ge=1)
    max_body_bytes: int = Field(default=16 << 20, ge=1024)
    read_timeout_s: float = Field(default=60.0, gt=0)
    max_connections: int = Field(default=8192, ge=1)
    request_timeout_s: float = Field(default=600.0, gt=0)
    max_attempts: int = Field(default=3, ge=1)
    max_concurrent: int = Field(default=4096, ge=1)

    @property
    def served_model_names(self) -> tuple[str, ...]:
        """Each once, in order; empty if nothing was said."""
        given = self.served_model_name
        return tuple(dict.fromkeys([given] if isinstance(given, str) else given or ()))

    @property
    def on_loopback(self) -> bool:
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    @model_validator(mode="after")
    def _key_beyond_loopback(self) -> GatewayConfig:
        if not self.on_loopback and self.api_key is None:
            raise ValueError(f"listening on {self.host} needs an api_key (only loopback may go without)")
        return self


class RouterConfig(_Section):
    """`local_prefill_tokens`: prompts with at most this many uncached tokens are prefilled where they decode."""

    policy: Literal["least-ttft", "round-robin"] = "least-ttft"
    local_prefill_tokens: int = Field(default=0, ge=0)


class TransferConfig(_Section):
    """KV movement. `transport` is what carries KV payloads between two instances: `shm` memory that both map (one host, one user,
    one process namespace; about 12 MiB for each pair that has exchanged KV), `tcp` the connection that they have anyway. `auto`
    takes the first of these that works for a pair; any other name is forced, and a pair for which it does not work is refused.
    `distributed` is torch.distributed over gloo; `auto` never takes it, because it is slower than `tcp` and for networks that
    only the cluster is on. `lease_s` is how long either side keeps blocks for a silent peer; `host` is the address that
    instances listen on, None for their node's own. Every socket between instances is authenticated with the cluster's keys."""

    transport: Literal["auto", "tcp", "shm", "distributed"] = "auto"
    lease_s: float = Field(default=5.0, gt=0)
    host: str | None = None


class HealthConfig(_Section):
    """Workers beat every `heartbeat_s`; silence for `dead_after_s` means dead. One with work that shows no sign of life for
    `stuck_after_s` is stuck: gateways move its work elsewhere, and the controller replaces it. A long step is not a death: each
    layer of it that comes to its end is a sign of life, so `stuck_after_s` has to be longer than one layer, not than one step.
    """

    heartbeat_s: float = Field(default=0.2, gt=0)
    dead_after_s: float = Field(default=1.5, gt=0)
    stuck_after_s: float = Field(default=3.0, gt=0)
    drain_timeout_s: float = Field(default=60.0, ge=0)

    @model_validator(mode="after")
    def _several_beats_a_silence(self) -> HealthConfig:
        if self.dead_after_s < 3 * self.heartbeat_s:
            raise ValueError(f"dead_after_s = {self.dead_after_s:g} must be at least 3 times heartbeat_s = {self.heartbeat_s:g}")
        return self


class ClusterConfig(_Section):
    """Everything `hetserve serve` needs to know."""

    model: str = Field(min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = Field(default=None, ge=2)
    pools: list[PoolConfig] = Field(min_length=1)
    gateway: GatewayConfig = GatewayConfig()
    router: RouterConfig = RouterConfig()
    engine: EngineConfig = EngineConfig()
    transfer: TransferConfig = TransferConfig()
    health: HealthConfig = HealthConfig()

    @model_validator(mode="after")
    def _can_serve(self) -> ClusterConfig:
        live = {pool.role for pool in self.pools if pool.replicas > 0}
        if Role.MIXED not in live and Role.DECODE not in live:
            raise ValueError("no pool can decode: add one with role decode or mixed and at least one replica")
        for index, pool in enumerate(self.pools):
            if pool.names_gpu and pool.resources.gpus == 0 and self.engine_of(pool).runner == "torch":
                raise ConfigError(
                    f"accelerator {pool.accelerator} is named but no GPU asked for, so that its CPU would compute; ask for 1 or "
                    "a part of one, or name CPU",
                    f"pools[{index}].resources.gpus",
                )
        names = [self.pool_name(index) for index in range(len(self.pools))]
        if len(set(names)) != len(names):
            raise ValueError(f"pool names must differ, got {names}")
        return self

    def pool_name(self, index: int) -> str:
        """The pool's own name, or its role, numbered where several pools share it."""
        pool = self.pools[index]
        if pool.name:
            return pool.name
        twins = [i for i, other in enumerate(self.pools) if other.role is pool.role and not other.name]
        return pool.role.value if len(twins) == 1 else f"{pool.role.value}{twins.index(index)}"

    def engine_of(self, pool: PoolConfig) -> EngineConfig:
        return pool.engine or self.engine


def parse_config(data: object) -> ClusterConfig:
    """Check a parsed YAML document. Raises ConfigError with the path of the first wrong key."""
    if not isinstance(data, Mapping):
        raise ConfigError(f"expected a mapping of settings, got {type(data).__name__}")
    try:
        return ClusterConfig.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        own = first.get("ctx", {}).get("error")
        if isinstance(own, ConfigError):  # of a check that spans several keys and names the wrong one itself
            raise own from error
        message = "unknown key" if first["type"] == "extra_forbidden" else first["msg"].removeprefix("Value error, ")
        raise ConfigError(message, _dotted(first["loc"])) from error


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> ClusterConfig:
    """Read one YAML file; `overrides` maps dotted keys (`gateway.port`) to values that win over the file's.

    Raises:
        ConfigError: no such file, not YAML, or a wrong key, named by its path.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(data).__name__}")
    for dotted, value in (overrides or {}).items():
        _set(data, dotted, value)
    return parse_config(data)


def _set(data: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, leaf = dotted.split(".")
    for key in parents:
        child = data.setdefault(key, {})
        if not isinstance(child, dict):
            raise ConfigError(f"expected a mapping, got {type(child).__name__}", key)
        data = child
    data[leaf] = value


def _dotted(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
