"""The service as its owner sees it: started, waited for, ended by order or by a fault."""

from __future__ import annotations

import threading

import pytest

from core.errors import LaunchError
from gateway.pump import Pump
from gateway.service import GatewayService
from mail.keys import ClusterKeys


class Broken(Exception):
    """What no code of the gateway raises."""


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

    m0 = stage.worker("m0", behave=lambda worker, submit: None)
    answers = []
    ask = {"json": {"model": "tiny", "prompt": "hi"}}
    client = threading.Thread(target=lambda: answers.append(stage.http.post("/v1/completions", **ask)))
    client.start()
    stage.until(lambda: m0.submits != [])
    monkeypatch.setattr(Pump, "_handle", breaks)
    with pytest.raises(Broken, match="in the pump"):
        stage.service.wait()
    client.join(10)
    assert answers[0].status_code == 503
    stage.service.worker_lost(("m0", 1))  # news for a gateway that has ended are no error


def test_a_gateway_that_was_never_started_cannot_be_waited_for(stage, model_path):
    with pytest.raises(LaunchError, match="not started"):
        GatewayService(stage.config, ClusterKeys.generate(), model_path).wait()
