"""A small cluster on this machine, and the processes it is made of: for the demo, and for a chat without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hetserve.commands.pools import PoolFlags, with_flags

if TYPE_CHECKING:
    import psutil

    from core.config import ClusterConfig

NAME = "demo"
"""What the model is served as, and the name of the one that comes with HetServe."""
GONE_WITHIN_S = 10.0


def small_cluster(model: Path | None, decode: int) -> ClusterConfig:
    """One prefill and some decode instances in fp32 on a free port of this machine, sharing whatever GPUs it has. Without a
    `model`, of the one that comes with HetServe."""
    from core.config import parse_config

    base = {
        "model": NAME if model is None else str(model.resolve()),
        "dtype": "float32",
        "gateway": {"host": "127.0.0.1", "port": 0, "served_model_name": NAME},
        "engine": {"max_num_seqs": 16},
        "router": {"local_prefill_tokens": 0},
    }
    return parse_config(with_flags(base, PoolFlags(replicas={"decode": decode}), local=True))


def hush() -> None:
    """Keep the controller's own log of members that come and go out of a person's sight, but for errors: this process tells it
    in its own words."""
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))


def children() -> list[psutil.Process]:
    """Every process that descends from this one."""
    import psutil

    return psutil.Process().children(recursive=True)


def left_over(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Which of these still run, after a short time to end in; and any that came later."""
    import psutil

    _, alive = psutil.wait_procs({*processes, *children()}, timeout=GONE_WITHIN_S)
    return [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
