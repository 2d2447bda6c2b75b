"""The service as its owner sees it: started, waited for, ended by order or by a fault."""

from __future__ import annotations

import asyncio
import threading
import time

import pytest

from core.clock import ManualClock
from core.errors import LaunchError
from gateway.gateway import Gateway
from gateway.serving.pump import Pump
from mail.keys import ClusterKeys


class Broken(Exception):
    """What no code of the gateway raises."""


def asked(stage):
    """A worker that has a request and says nothing, the client's thread that waits for the answer, and where that will be."""
    m0 = stage.worker("m0", behave=lambda worker, submit: None)
    answers = []
    ask = {"json": {"model": "tiny", "prompt": "hi"}}
    client = threading.Thread(target=lambda: answers.append(stage.http.post("/v1/completions", **ask)))
    client.start()
    stage.until(lambda: m0.submits != [])
    return m0, client, answers


def test_waiting_for_a_gateway_returns_once_it_is_stopped(stage):
    waiting = threading.Thread(target=stage.service.wait)
    waiting.start()
    assert stage.http.get("/version").status_code == 200
    assert waiting.is_alive()
    stage.service.stop()
    waiting.join(10)
    assert not waiting.is_alive()
    stage.service.wait()


def test_a_fault_of_the_pump_ends_the_gateway_and_is_raised_to_whoever_waits(stage, monkeypatch):
    def breaks(pump, message, events):
        raise Broken("in the pump")

    _, client, answers = asked(stage)
    monkeypatch.setattr(Pump, "_handle", breaks)
    with pytest.raises(Broken, match="in the pump"):
        stage.service.wait()
    client.join(10)
    assert answers[0].status_code == 503
    stage.service.worker_lost(("m0", 1))  # news for a gateway that has ended are no error


def test_a_gateway_that_was_never_started_cannot_be_waited_for(stage, model_path):
    with pytest.raises(LaunchError, match="not started"):
        Gateway(stage.config, ClusterKeys.generate(), model_path).wait()


def test_a_gateway_that_stood_still_listens_before_it_takes_others_for_dead(stage, model_path):
    service, clock, said = Gateway(stage.config, ClusterKeys.generate(), model_path), ManualClock(), []
    service._clock = clock

    class Sweeps:
        def was_deaf(self, seconds: float) -> None:
            said.append(round(seconds))

        def sweep(self) -> None:
            said.append("sweep")
            if len(said) > 2:
                raise asyncio.CancelledError
            asyncio.get_running_loop().call_soon(clock.advance, 10.0)

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(service._sweep(Sweeps()))
    assert said == ["sweep", 10, "sweep"]


def test_a_gateway_whose_loop_was_held_up_loses_no_attempt(stage):
    """Heartbeats wait in the loop meanwhile, behind the timer that looks for silence."""
    m0, client, answers = asked(stage)
    over = threading.Semaphore(0)

    def holds_the_loop_up() -> None:
        time.sleep(1.5 * stage.config.health.dead_after_s)
        over.release()

    for _ in range(3):
        stage.service._loop.call_soon_threadsafe(holds_the_loop_up)
        assert over.acquire(timeout=60)
    m0.later(lambda: m0.answer(m0.submits[0]))
    client.join(20)
    assert (answers[0].status_code, len(m0.submits)) == (200, 1)
