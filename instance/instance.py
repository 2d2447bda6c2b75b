"""One instance: an engine with its workers, its mailbox, its transfers and its heart.

Every instance can read and write. Its role says which of the two it takes work for, and may change while it runs.

No Ray in here: an actor holds an `Instance`, and so may a test. `start` takes as long as loading takes; afterwards the
instance runs on threads of its own.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable
from dataclasses import replace

import structlog

from core.clock import MonotonicClock
from core.config import Role
from core.errors import Unavailable
from core.messages import Address, Heartbeat
from decode.worker import DecodeWorker
from engine.device import Device
from engine.engine import Engine
from instance.heart import Heart
from instance.loaded_model import LoadedModel, simulated_model
from instance.loop import EngineLoop, TransferEvent
from instance.model_source import found_here
from instance.spec import InstanceReport, InstanceSpec
from kv_transfer.carriers import carriers_for
from kv_transfer.receiver import KVReceiver
from kv_transfer.sender import KVSender
from kv_transfer.transports.tcp import TcpTransport
from mail.attempt_book import AttemptBook
from mail.door import Door
from mail.mailbox import Mailbox
from mail.outbox import Outbox
from mail.peers import Peers
from prefill.worker import PrefillWorker

log = structlog.get_logger()

DRAIN_POLL_S = 0.05
CLOSE_S = 10.0
"""How long `stop` waits for the step that the device is in."""


class Instance:
    """Serves from `start` until `stop`. All methods may be called from any thread, `start` once.

    `wait` returns when the instance was stopped and raises when its loop died.
    """

    def __init__(self, spec: InstanceSpec) -> None:
        self._spec = spec
        self._clock = MonotonicClock()
        self._ended = threading.Event()
        self._failure: Exception | None = None

    def start(self) -> InstanceReport:
        """Load the model, listen, and begin to serve and to beat.

        Raises:
            ModelError: the model cannot be served.
            LaunchError, TransferError: a socket could not be bound.
        """
        spec = self._spec
        self._model = _load(spec)
        began_s = time.perf_counter()
        self._door = Door(spec.keys)
        self._mailbox = Mailbox(self._door, self._host)
        self._device = Device(self._model.runner, self._model.bind_thread, self._mailbox.wake)
        self._engine = Engine(self._device, spec.engine, self._clock)
        self._peers = Peers(self._door)
        self._address = Address(spec.name, spec.incarnation, self._mailbox.endpoint)
        self._loop = self._staff()
        self._heart = Heart(self._door, self._beat, spec.config.health.heartbeat_s)
        self._heart.connect(spec.gateways)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._heart.start()
        seconds = {**self._model.seconds, "sockets": time.perf_counter() - began_s}
        return InstanceReport(self._address, self._receiver.endpoint, self._model.runner.num_blocks, os.getpid(), seconds)

    def connect(self, gateways: Iterable[Address]) -> None:
        """Beat for these gateways from now on."""
        self._heart.connect(gateways)

    def wait(self) -> None:
        self._ended.wait()
        if self._failure is not None:
            raise Unavailable(f"instance {self._spec.name} died: {self._failure!r}") from self._failure

    def drain(self, timeout_s: float) -> bool:
        """Refuse new attempts and let those here end. False if some were left when the time was up."""
        self._loop.drain()
        until_s = self._clock.now() + timeout_s
        while not self._loop.progress.drained and self._clock.now() < until_s and not self._ended.is_set():
            time.sleep(DRAIN_POLL_S)
        return self._loop.progress.drained

    def undrain(self) -> None:
        """Take new attempts again."""
        self._loop.drain(False)

    def set_role(self, role: Role) -> None:
        """From now on take work of this role only, and tell the gateways so. What is here goes on to its end."""
        self._loop.set_role(role)

    def stop(self) -> None:
        """End at once; whatever is running is lost. Idempotent."""
        self._loop.stop()
        self._ended.wait()
        self._thread.join()

    @property
    def progress_age_s(self) -> float | None:
        """How long there has been no sign of life, neither of the loop nor, in a step, of the device; a fraction of a second when
        idle. None once it has ended. Call it after `start`."""
        return None if self._ended.is_set() else self._loop.stalled_s

    def invariants(self) -> list[str]:
        """What an idle instance should not have, one line each. The engine is looked into only once no attempt is here,
        because its thread changes it otherwise."""
        attempts = self._loop.progress.attempts
        found = [f"{attempts} attempts are still here"] if attempts else list(self._engine.invariants())
        if self._receiver.open_grants:
            found.append(f"{self._receiver.open_grants} grants are still open")
        if self._mailbox.rejected:
            found.append(f"{self._mailbox.rejected} malformed messages arrived")
        return found

    # --- inside -------------------------------------------------------------------------------------------------------

    @property
    def _host(self) -> str:
        return self._spec.config.transfer.host or self._spec.host

    def _staff(self) -> EngineLoop:
        """Put the workers around the engine."""
        spec, model = self._spec, self._model
        lease_s = spec.config.transfer.lease_s
        transport = TcpTransport(host=self._host)
        secret, carriers = spec.keys.transfer_secret, carriers_for(spec.config.transfer.transport, self._host)
        self._sender = KVSender(
            model.store, transport, secret, model.fingerprint, spec.incarnation, self._clock, self._post, carriers
        )
        self._receiver = KVReceiver(
            model.store, transport, secret, model.fingerprint, spec.incarnation, self._clock, self._post, carriers
        )
        outbox = Outbox(self._address, self._peers, self._clock)
        book = AttemptBook(self._address, outbox, self._peers, self._clock, lease_s)
        prefill = PrefillWorker(self._engine, self._sender, book, self._clock)
        decode = DecodeWorker(
            self._engine,
            self._receiver,
            book,
            self._peers,
            self._address,
            self._clock,
            lease_s,
            spec.engine.max_waiting_tokens,
        )
        return EngineLoop(self._engine, self._mailbox, book, prefill, decode, spec.role, self._clock, model.store.fence)

    def _post(self, event: TransferEvent) -> None:
        self._loop.post(event)

    def _run(self) -> None:
        try:
            self._loop.run()
        except Exception as error:  # the boundary of the instance: whoever waits for it is told
            log.exception("engine loop died", instance=self._spec.name)
            self._failure = error
        finally:
            self._shut()
            self._ended.set()

    def _shut(self) -> None:
        self._heart.stop()
        if not self._device.close(CLOSE_S):
            log.warning("a step does not end: the device is left to the end of the process", instance=self._spec.name)
        self._sender.close()
        self._receiver.stop()
        self._peers.close()
        self._mailbox.close()
        self._door.close()

    def _beat(self) -> Heartbeat:
        spec, runner = self._spec, self._model.runner
        return Heartbeat(
            worker=self._address,
            role=self._loop.progress.role.value,
            accelerator=spec.accelerator,
            model=spec.config.model,
            fingerprint=self._model.fingerprint,
            layout=runner.layout,
            total_blocks=runner.num_blocks,
            capacity_tokens=self._engine.capacity_tokens,
            max_model_len=runner.max_model_len,
            max_num_seqs=spec.engine.max_num_seqs,
            kv_endpoint=self._receiver.endpoint,
            cost=self._model.cost,
            load=self._loop.load(),
            node=spec.node,
        )


def _load(spec: InstanceSpec) -> LoadedModel:
    """The model, found on this machine. The instance goes by the name that all instances know it by, not by that folder's."""
    spec = replace(spec, config=found_here(spec.config, weights=spec.engine.runner != "simulated"))
    if spec.engine.runner == "simulated":
        return simulated_model(spec)
    from instance.torch_model import torch_model  # a simulated instance starts without importing torch

    return torch_model(spec)
