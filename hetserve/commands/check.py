"""`hetserve check FILE`: is this configuration right, and what does it come to?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hetserve._app_path import use_app


def check(file: Annotated[Path, typer.Argument(help="A cluster's YAML file.", dir_okay=False)]) -> None:
    """Check a configuration file and print it with every default filled in."""
    use_app()
    import yaml

    from core.config import load_config

    config = load_config(file)
    shown = config.model_dump(mode="json")
    if config.gateway.api_key is not None:
        shown["gateway"]["api_key"] = "***"
    typer.echo(yaml.safe_dump(shown, sort_keys=False), nl=False)
