"""A gateway without an API, for tests of the cluster around it: it listens for heartbeats and says over HTTP what it heard.

GET /health answers 200 once it has heard from somebody, with how many there are of each role; GET /heard lists
`name -> [incarnation, role, accelerator, node]`.
Runs inside an actor, found by its import path.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from cluster.gateway_process import GatewayReport, GatewaySpec
from core.errors import PortInUse
from core.messages import Address, Heartbeat
from mail.door import Door
from mail.mailbox import Mailbox


class FakeGateway:
    def __init__(self, spec: GatewaySpec) -> None:
        self._spec = spec
        self._heard: dict[str, list[Any]] = {}
        self._stopped = threading.Event()
        self._draining = threading.Event()

    def start(self) -> GatewayReport:
        gateway = self._spec.config.gateway
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                status, body = outer._answer(self.path)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

            def log_message(self, *_: object) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer((gateway.host, gateway.port), Handler)
        except OSError as error:
            raise PortInUse(f"cannot listen on {gateway.host}:{gateway.port}") from error
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        self._door = Door(self._spec.keys)
        self._mailbox = Mailbox(self._door, self._spec.host)
        threading.Thread(target=self._listen, daemon=True).start()
        address = Address(self._spec.name, self._spec.incarnation, self._mailbox.endpoint)
        return GatewayReport(address, f"http://{gateway.host}:{self._server.server_port}", os.getpid(), {"open": 0.01})

    def connect(self, gateways: Iterable[Address]) -> None:
        pass

    def lost(self, name: str, incarnation: int) -> None:
        if self._heard.get(name, [0])[0] == incarnation:
            del self._heard[name]

    def wait(self) -> None:
        self._stopped.wait()

    def drain(self, timeout_s: float) -> bool:
        """Leaves word in the file that the served name is the path of."""
        if path := self._spec.config.gateway.served_model_name:
            with open(path, "a", encoding="utf-8") as log:
                log.write(f"drained {timeout_s:g}\n")
        return True

    def stop(self) -> None:
        self._server.shutdown()
        self._stopped.set()

    @property
    def progress_age_s(self) -> None:
        return None

    def invariants(self) -> list[str]:
        return []

    def _answer(self, path: str) -> tuple[int, Any]:
        if path == "/heard":
            return 200, self._heard
        roles = Counter(role for _, role, _, _ in self._heard.values())
        return (200, {"instances": roles}) if self._heard else (503, {"why": "nobody was heard"})

    def _listen(self) -> None:
        while not self._stopped.is_set():
            self._mailbox.wait(0.05)
            while (message := self._mailbox.receive()) is not None:
                if isinstance(message, Heartbeat):
                    worker = message.worker
                    self._heard[worker.name] = [worker.incarnation, message.role, message.accelerator, message.node]
