"""The routes that say how things are: health, version, models, metrics, and what `hetserve status` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from core.clock import Clock
from gateway.http.json_response import JSON
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.intake import Intake
from gateway.serving.metrics import CONTENT_TYPE, Metrics
from router.state import Instance


@dataclass(frozen=True)
class StatusRoutes:
    intake: Intake
    dispatcher: Dispatcher
    metrics: Metrics
    clock: Clock
    version: str
    extra_invariants: Callable[[], dict[str, int]] = dict

    async def health(self, request: Request) -> Response:
        """200 when a request could be served now; else 503 with the reasons. Says how many instances of each role live."""
        reasons = []
        snapshot = self.dispatcher.snapshot()
        if self.dispatcher.draining:
            reasons.append("the gateway is draining")
        if not snapshot.decode:
            reasons.append("no live instance can decode")
        roles = Counter(item.role.value for item in snapshot.instances)
        status = {"status": "unavailable" if reasons else "ok", "reasons": reasons, "instances": roles}
        return JSON(status, 503 if reasons else 200)

    async def live(self, request: Request) -> Response:
        """200 while the loop turns. A gateway without workers, or one that drains, is alive: to restart it would help nobody."""
        return JSON({"status": "ok"})

    async def load(self, request: Request) -> Response:
        return JSON({"server_load": self.dispatcher.in_flight})

    async def show_version(self, request: Request) -> Response:
        return JSON({"version": self.version})

    async def models(self, request: Request) -> Response:
        return JSON({"object": "list", "data": [self._model(name) for name in self.intake.model.names]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model_id"]
        self.intake.check_model(name)
        return JSON(self._model(name))

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.render(), media_type=CONTENT_TYPE)

    async def instances(self, request: Request) -> Response:
        now_s = self.clock.now()
        rows = [_row(item, now_s) for item in self.dispatcher.snapshot().instances]
        return JSON({"instances": sorted(rows, key=lambda row: (row["role"], row["name"]))})

    async def requests(self, request: Request) -> Response:
        """Recent finished generations, newest first, and those under way."""
        journal = self.dispatcher.journal
        return JSON({"recent": journal.recent(), "running": [entry.summary() for entry in journal.open.values()]})

    async def invariants(self, request: Request) -> Response:
        return JSON({**self.dispatcher.invariants(), **self.extra_invariants()})

    def _model(self, name: str) -> dict[str, Any]:
        model = self.intake.model
        return {
            "id": name,
            "object": "model",
            "created": model.created_s,
            "owned_by": "hetserve",
            "root": model.root,
            "parent": None,
            "max_model_len": self.intake.longest_context,
        }


def _row(item: Instance, now_s: float) -> dict[str, Any]:
    load, beat = item.load, item.beat
    return {
        "name": item.name,
        "role": item.role.value,
        "accelerator": beat.accelerator,
        "node": beat.node,
        "incarnation": item.address.incarnation,
        "state": "stuck" if item.stuck else "draining" if load.draining else "ready",
        "last_seen_s": round(now_s - item.last_seen_s, 3),
        "running": load.running,
        "waiting": load.waiting,
        "waiting_tokens": load.waiting_tokens,
        "context_tokens": load.context_tokens,
        "free_blocks": load.free_blocks,
        "held_blocks": load.held_blocks,
        "total_blocks": beat.total_blocks,
        "block_size": beat.layout.block_size,
        "dtype": beat.layout.dtype,
        "max_model_len": beat.max_model_len,
        "max_num_seqs": beat.max_num_seqs,
        "steps": load.steps,
        "model": beat.model,
        "kind": item.kind,
        "mailbox": item.address.mailbox,
        "kv_endpoint": beat.kv_endpoint,
    }
