"""`hetserve serve`: start a cluster and serve until told to stop."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hetserve._app_path import use_app
from hetserve.commands.pools import PoolFlags, with_flags
from hetserve.commands.usage import UsageError, console

if TYPE_CHECKING:
    from core.config import ClusterConfig

_POOLS, _ENGINE, _HTTP = "Pools", "Engine", "HTTP"


def serve(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model folder, an id on the Hugging Face Hub, or demo: the model that comes with HetServe.", show_default=False
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A cluster's YAML file; flags win over it.", dir_okay=False)] = None,
    prefill: Annotated[int | None, typer.Option(min=0, help="Prefill instances.  [default: 1]", rich_help_panel=_POOLS)] = None,
    decode: Annotated[int | None, typer.Option(min=0, help="Decode instances.  [default: 1]", rich_help_panel=_POOLS)] = None,
    mixed: Annotated[
        int | None, typer.Option(min=0, help="Instances that do both; alone, no others are made.", rich_help_panel=_POOLS)
    ] = None,
    prefill_accelerator: Annotated[str | None, typer.Option(help="H100, or L40S,A10G.", rich_help_panel=_POOLS)] = None,
    decode_accelerator: Annotated[str | None, typer.Option(rich_help_panel=_POOLS)] = None,
    mixed_accelerator: Annotated[str | None, typer.Option(rich_help_panel=_POOLS)] = None,
    gpus: Annotated[
        float | None,
        typer.Option(min=0, help="GPUs of each instance; if not given, this machine's are shared out.", rich_help_panel=_POOLS),
    ] = None,
    policy: Annotated[str | None, typer.Option(help="least-ttft or round-robin.", rich_help_panel=_POOLS)] = None,
    local_prefill_tokens: Annotated[
        int | None, typer.Option(min=0, help="Prompts up to this long are read where they decode.", rich_help_panel=_POOLS)
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16.", rich_help_panel=_ENGINE)] = None,
    max_model_len: Annotated[int | None, typer.Option(min=2, help="Longest context.", rich_help_panel=_ENGINE)] = None,
    attention: Annotated[str | None, typer.Option(help="auto, cpu, sdpa, varlen or flash.", rich_help_panel=_ENGINE)] = None,
    block_size: Annotated[int | None, typer.Option(min=1, help="Tokens per KV block.", rich_help_panel=_ENGINE)] = None,
    kv_bytes: Annotated[int | None, typer.Option(min=1, help="Size of the KV cache.", rich_help_panel=_ENGINE)] = None,
    max_num_seqs: Annotated[int | None, typer.Option(min=1, help="Sequences per step.", rich_help_panel=_ENGINE)] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per step.", rich_help_panel=_ENGINE)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads of each instance.", rich_help_panel=_ENGINE)] = None,
    host: Annotated[str | None, typer.Option(help="Beyond loopback an API key is needed.", rich_help_panel=_HTTP)] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one.", rich_help_panel=_HTTP)] = None,
    api_key: Annotated[str | None, typer.Option(envvar="HETSERVE_API_KEY", rich_help_panel=_HTTP)] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model; once more for each alias.", rich_help_panel=_HTTP)
    ] = None,
    generation_config: Annotated[
        str | None, typer.Option(help="auto: sampling defaults are the model's own; off.", rich_help_panel=_HTTP)
    ] = None,
    ray_address: Annotated[str | None, typer.Option(help="A Ray cluster to join; RAY_ADDRESS if not given.")] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show Ray's own log too.")] = False,
) -> None:
    """Serve MODEL, or what --config says, until interrupted."""
    settings = {
        "model": model,
        "dtype": dtype,
        "max_model_len": max_model_len,
        "gateway.host": host,
        "gateway.port": port,
        "gateway.api_key": api_key,
        "gateway.served_model_name": served_model_name or None,
        "gateway.generation_config": generation_config,
        "router.policy": policy,
        "router.local_prefill_tokens": local_prefill_tokens,
        "engine.attention": attention,
        "engine.block_size": block_size,
        "engine.kv_bytes": kv_bytes,
        "engine.max_num_seqs": max_num_seqs,
        "engine.max_num_batched_tokens": max_num_batched_tokens,
        "engine.threads": threads,
    }
    pools = PoolFlags(
        replicas={"prefill": prefill, "decode": decode, "mixed": mixed},
        accelerators={"prefill": prefill_accelerator, "decode": decode_accelerator, "mixed": mixed_accelerator},
        gpus=gpus,
    )
    use_app()
    resolved = serve_config({key: value for key, value in settings.items() if value is not None}, pools, config, ray_address)
    from cluster.launch import serve as run

    run(resolved, address=ray_address, console=console(), verbose=verbose)


def serve_config(settings: dict[str, Any], pools: PoolFlags, file: Path | None, ray_address: str | None) -> ClusterConfig:
    """What the flags and the file come to. `settings` has dotted keys; flags win over the file.

    Raises:
        UsageError: neither a model nor a file, or pool flags that do not fit the file's pools.
        ConfigError: naming the wrong key.
    """
    from core.config import load_config, parse_config
    from instance.embedded import is_embedded

    local = not (ray_address or os.environ.get("RAY_ADDRESS"))
    if file is not None:
        base = load_config(file, settings).model_dump(mode="json")
    elif "model" in settings:
        base = _nested(settings)
    else:
        raise UsageError("give a MODEL (demo is the small one that comes with HetServe), or --config FILE")
    data = with_flags(base, pools, local=local)
    if not is_embedded(data["model"]):
        folder = Path(data["model"]).expanduser()
        data["model"] = str(folder.resolve()) if folder.is_dir() else data["model"]
    return parse_config(data)


def _nested(settings: dict[str, Any]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for dotted, value in settings.items():
        *parents, leaf = dotted.split(".")
        place = data
        for key in parents:
            place = place.setdefault(key, {})
        place[leaf] = value
    return data
