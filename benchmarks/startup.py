"""How long a cluster takes to start, and where the time goes: Ray, one gateway, one prefill and one decode instance.

    python -m benchmarks.startup             without a model: simulated instances
    python -m benchmarks.startup --size 125m with a random-weight Llama of that size, loaded by each instance

Each run starts a Ray of its own and ends it.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from cluster.launch import Cluster
from cluster.progress import breakdown
from core.config import ClusterConfig, parse_config


def main(
    runs: Annotated[int, typer.Option(min=1, help="Clusters to start, one after the other.")] = 3,
    size: Annotated[str | None, typer.Option(help="Size of the model to load; none for simulated instances.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Time `Cluster.start` until the gateway says that it can serve."""
    console = Console(quiet=as_json)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = _config(Path(folder), size)
        for _ in range(runs):
            with Cluster(config) as cluster:
                members = cluster.instances()
                console.print(breakdown(cluster.seconds, members, cluster.total_s))
                results.append(
                    {
                        "total_s": cluster.total_s,
                        "stages_s": dict(cluster.seconds),
                        "members_s": {member.name: dict(member.seconds) for member in members},
                    }
                )
    median_s = statistics.median(result["total_s"] for result in results)
    console.print(f"Median of {runs}: {median_s:.1f} s")
    if as_json:
        print(json.dumps(results, indent=2))


def _config(folder: Path, size: str | None) -> ClusterConfig:
    from tooling.model_factory import make_model

    model = make_model(folder / "model", "llama", size=size or "tiny", dtype="bfloat16" if size else "float32")
    return parse_config(
        {
            "model": str(model),
            "engine": {"runner": "torch" if size else "simulated"},
            "gateway": {"port": 0},
            "pools": [{"role": "prefill"}, {"role": "decode"}],
        }
    )


if __name__ == "__main__":
    typer.run(main)
