"""`hetserve make-model FOLDER`: a model folder with random weights, for trying things without a download."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from hetserve._app_path import use_app
from hetserve.commands.usage import UsageError


def make_model(
    folder: Annotated[Path, typer.Argument(help="Where to write it.", file_okay=False)],
    architecture: Annotated[str, typer.Option(help="A model_type of transformers: llama, qwen3, mixtral, ...")] = "llama",
    size: Annotated[str, typer.Option(help="tiny, 15m, 125m, 1b or 8b parameters of a Llama.")] = "tiny",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same weights.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Write into a folder that is not empty.")] = False,
) -> None:
    """Make a model with random weights: real files, made-up numbers. Its answers are gibberish."""
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype: got {dtype}, expected float32, bfloat16 or float16")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise UsageError(f"{folder} is not empty; --force writes into it")
    use_app()
    from transformers.utils.logging import disable_progress_bar

    from tooling.model_factory import check_served
    from tooling.model_factory import make_model as make

    disable_progress_bar()
    began_s = time.monotonic()
    check_served(architecture)
    make(folder, architecture, size=size, dtype=dtype, seed=seed)
    megabytes = sum(file.stat().st_size for file in folder.rglob("*.safetensors")) / 1e6
    typer.echo(f"{folder}: {architecture} {size}, {megabytes:.0f} MB of {dtype} weights, in {time.monotonic() - began_s:.1f} s")
