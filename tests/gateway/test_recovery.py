"""Attempts fail in every way that can be scripted; the client sees one stream, equal to the unfailed one, or one error."""

from __future__ import annotations

import json
import socket
import threading

import msgspec
import pytest

from core.messages import Address, ServedBy, TokenItem
from core.request import FinishReason
from tests.gateway.fake_worker import expected_text

PROMPT = "tell me"


def complete(stage, tokens=12, **fields):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "seed": 5, **fields}
    return stage.http.post("/v1/completions", json=body)


def text_of(response):
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["text"]


def oracle(stage, tokens=12):
    return expected_text(stage.ids(PROMPT), 5, tokens)


def dies_after(count):
    """Serves `count` tokens of its first attempt, then vanishes."""

    def behave(worker, submit):
        for position in list(worker.positions(submit))[:count]:
            worker.send(worker.item(submit, position))
        worker.die()

    return behave


def silent(worker, submit):
    """Takes the work and never answers."""


def test_prefill_and_decode_workers_share_a_request(stage):
    p, d = stage.worker("p0", "prefill"), stage.worker("d0", "decode")
    response = stage.http.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 5},
        headers={"x-hetserve-trace": "1"},
    )
    assert text_of(response) == oracle(stage)
    assert (p.submits[0].stage, p.submits[0].peer) == ("prefill", d.address)
    assert (d.submits[0].stage, d.submits[0].peer) == ("decode", p.address)
    assert p.submits[0].attempt == d.submits[0].attempt
    assert p.submits[0].gateway == stage.service.address
    trace = response.json()["hetserve"]
    assert (trace["prefill"], trace["decode"], trace["kv_bytes"], trace["cached_tokens"]) == ("p0", "d0", 4096, 2)
    assert trace["ttft_s"] > 0
    assert p.cancels == d.cancels == []
    stage.at_rest()


def test_decode_tokens_that_overtake_the_first_token_wait_for_it(stage):
    first_may_go = threading.Event()

    def late(worker, submit):
        first_may_go.wait(5)
        worker.answer(submit)

    def early(worker, submit):
        worker.answer(submit)
        first_may_go.set()

    stage.worker("p0", "prefill", behave=late)
    stage.worker("d0", "decode", behave=early)
    assert text_of(complete(stage)) == oracle(stage)


def test_items_in_any_order_with_repeats_and_overlaps_are_read_once_each(stage):
    def scrambled(worker, submit):
        for position, count in ((4, 3), (0, 2), (0, 1), (1, 4), (7, 5), (2, 2), (7, 5)):
            worker.send(worker.item(submit, position, count))

    stage.worker("m0", behave=scrambled)
    assert text_of(complete(stage)) == oracle(stage)
    stage.at_rest()


@pytest.mark.parametrize("served", [0, 1, 7, 11])
def test_a_worker_that_dies_after_any_token_is_replaced_without_a_trace(stage, served):
    m0 = stage.worker("m0", behave=dies_after(served))
    m1 = stage.worker("m1", waiting=3, waiting_tokens=5000)  # so that m0 is the first choice
    assert text_of(complete(stage)) == oracle(stage)
    replay = m1.submits[0]
    assert replay.attempt != m0.submits[0].attempt
    assert len(replay.tokens) // 4 - replay.prompt_tokens == served
    assert replay.sampling == m0.submits[0].sampling
    stage.at_rest()


def test_a_stream_goes_on_where_it_was_when_its_decode_worker_dies(stage):
    stage.worker("p0", "prefill")
    stage.worker("d0", "decode", behave=dies_after(4))
    stage.worker("d1", "decode", running=5, context_tokens=3000)
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 12, "seed": 5, "stream": True}
    pieces = []
    with stage.http.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                pieces += [choice["text"] for choice in json.loads(line[6:])["choices"]]
    assert "".join(pieces) == oracle(stage)
    stage.at_rest()


def test_without_another_decode_worker_the_request_waits_for_the_restarted_one(stage):
    stage.worker("m0", behave=dies_after(3))
    answers = []
    client = threading.Thread(target=lambda: answers.append(complete(stage)))
    client.start()
    stage.until(lambda: stage.service.snapshot().instances == ())
    stage.worker("m0", incarnation=2)
    client.join()
    assert text_of(answers[0]) == oracle(stage)
    stage.at_rest()


def test_when_nobody_comes_back_the_request_ends_with_an_error_by_its_deadline(set_stage):
    stage = set_stage(gateway={"port": 0, "request_timeout_s": 1.0})
    stage.worker("m0", behave=dies_after(3))
    response = complete(stage)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    stage.at_rest()


def test_a_replacement_that_dies_as_well_is_replaced_too(stage):
    stage.worker("m0", behave=dies_after(3))
    stage.worker("m1", behave=dies_after(4), waiting=3, waiting_tokens=5000)
    m2 = stage.worker("m2", waiting=3, waiting_tokens=9000)
    assert text_of(complete(stage)) == oracle(stage)
    assert m2.begin(m2.submits[0]) == 7
    stage.at_rest()


def test_a_restart_is_noticed_by_its_incarnation_before_the_old_one_falls_silent(set_stage):
    stage = set_stage(health={"dead_after_s": 60})
    stage.worker("m0", behave=silent)
    answers = []
    client = threading.Thread(target=lambda: answers.append(complete(stage)))
    client.start()
    stage.until(lambda: stage.workers[0].submits != [])
    stage.worker("m0", incarnation=2)
    client.join()
    assert text_of(answers[0]) == oracle(stage)


def test_the_cluster_can_report_a_death_ahead_of_silence(set_stage):
    stage = set_stage(health={"dead_after_s": 60})
    m0 = stage.worker("m0", behave=silent)
    stage.worker("m1", waiting=3, waiting_tokens=5000)
    answers = []
    client = threading.Thread(target=lambda: answers.append(complete(stage)))
    client.start()
    stage.until(lambda: m0.submits != [])
    stage.service.worker_lost(("m0", 1))
    client.join()
    assert text_of(answers[0]) == oracle(stage)


def test_a_dead_prefill_worker_does_not_disturb_a_stream_that_decodes_already(stage):
    def one_token(worker, submit):
        worker.send(worker.item(submit, 1))

    p0 = stage.worker("p0", "prefill")
    d0 = stage.worker("d0", "decode", behave=one_token)
    answers = []
    client = threading.Thread(target=lambda: answers.append(complete(stage)))
    client.start()
    stage.until(lambda: [entry["tokens"] for entry in stage.http.get("/debug/requests").json()["running"]] == [2])
    p0.die()
    stage.until(lambda: [item.name for item in stage.service.snapshot().instances] == ["d0"])
    submit = d0.submits[0]
    d0.later(lambda: d0.send(*(d0.item(submit, position) for position in range(2, 12))))
    client.join()
    assert text_of(answers[0]) == oracle(stage)
    assert len(d0.submits) == 1


def test_a_prefill_worker_that_dies_before_its_token_arrives_is_replaced(stage):
    stage.worker("p0", "prefill", behave=lambda worker, submit: worker.die())
    d0 = stage.worker("d0", "decode", behave=lambda worker, submit: submit.stage == "local" and worker.answer(submit))
    assert text_of(complete(stage)) == oracle(stage)
    assert [submit.stage for submit in d0.submits] == ["decode", "local"]
    stage.at_rest()


def test_a_retryable_failure_is_retried_elsewhere(stage):
    stage.worker("m0", behave=lambda worker, submit: worker.fail(submit, "engine_fault"))
    m1 = stage.worker("m1", waiting=3, waiting_tokens=5000)
    assert text_of(complete(stage)) == oracle(stage)
    assert len(m1.submits) == 1


def test_a_full_worker_passes_the_request_on(stage):
    stage.worker("m0", behave=lambda worker, submit: worker.fail(submit, "overloaded"))
    stage.worker("m1", waiting=3, waiting_tokens=5000)
    assert text_of(complete(stage)) == oracle(stage)


def test_a_failed_transfer_falls_back_to_prefilling_where_it_decodes(stage):
    stage.worker("p0", "prefill", behave=silent)

    def cannot_receive(worker, submit):
        if submit.stage == "decode":
            worker.fail(submit, "lease_expired")
        else:
            worker.answer(submit)

    d0 = stage.worker("d0", "decode", behave=cannot_receive)
    assert text_of(complete(stage)) == oracle(stage)
    assert [submit.stage for submit in d0.submits] == ["decode", "local"]
    stage.until(lambda: stage.workers[0].cancels == [d0.submits[0].attempt])


@pytest.mark.parametrize(("code", "status"), [("overloaded", 429), ("worker_lost", 503), ("engine_fault", 500)])
def test_a_stream_that_fails_before_its_first_token_is_an_ordinary_error_answer(stage, code, status):
    stage.worker("m0", behave=lambda worker, submit: worker.fail(submit, code, "because"))
    response = complete(stage, stream=True)
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.json()["error"]["code"] == code
    assert ("retry-after" in response.headers) == (status in (429, 503))
    assert response.headers["x-should-retry"] == ("true" if status == 429 else "false")  # after attempts of the gateway's own
    stage.at_rest()


@pytest.mark.parametrize("begun", [False, True])
def test_an_error_of_a_stream_is_counted_once_wherever_it_happens(stage, begun):
    def breaks(worker, submit):
        if begun:
            worker.send(worker.item(submit, 0))
        worker.fail(submit, "payload_too_large", "because")

    stage.worker("m0", behave=breaks)
    response = complete(stage, stream=True)
    assert response.status_code == (200 if begun else 413)
    assert ('data: {"error"' in response.text) == begun
    assert 'hetserve_errors_total{code="payload_too_large"} 1.0' in stage.http.get("/metrics").text


@pytest.mark.parametrize(
    ("code", "status", "attempts"),
    [("invalid_request", 400, 1), ("engine_fault", 500, 3), ("corrupt_transfer", 503, 3), ("made_up_code", 500, 1)],
)
def test_a_failure_for_good_is_one_typed_error(stage, code, status, attempts):
    m0 = stage.worker("m0", behave=lambda worker, submit: worker.fail(submit, code, "because"))
    response = complete(stage)
    assert response.status_code == status
    assert response.json()["error"]["message"] == "because"
    assert response.json()["error"]["code"] == ("internal_error" if code == "made_up_code" else code)
    assert len(m0.submits) == attempts
    assert len({submit.attempt for submit in m0.submits}) == attempts
    stage.at_rest()


def test_a_worker_that_never_answers_ends_in_a_deadline_error_and_is_told_to_stop(set_stage):
    stage = set_stage(gateway={"port": 0, "request_timeout_s": 0.3})
    m0 = stage.worker("m0", behave=silent)
    response = complete(stage)
    assert response.status_code == 504
    assert response.json()["error"]["code"] == "deadline_exceeded"
    stage.until(lambda: m0.cancels == [m0.submits[0].attempt])
    assert 0 < m0.submits[0].deadline_s <= 0.3
    stage.at_rest()


def test_a_stuck_worker_loses_its_requests_while_its_heart_beats_on(stage):
    stage.worker("m0", behave=silent, running=1, steps=7)
    stage.worker("m1", waiting=3, waiting_tokens=5000)
    assert text_of(complete(stage)) == oracle(stage)
    states = {row["name"]: row["state"] for row in stage.http.get("/debug/instances").json()["instances"]}
    assert states == {"m0": "stuck", "m1": "ready"}
    assert len(stage.workers[0].submits) == 1


def test_tokens_of_an_older_incarnation_or_of_a_stranger_do_not_count(stage):
    def haunted(worker, submit):
        ghost = msgspec.structs.replace
        wrong = TokenItem(attempt=submit.attempt, position=0, tokens=(1, 2, 3), finish=FinishReason.STOP, served=ServedBy())
        worker.send(wrong, worker=ghost(worker.address, incarnation=1))
        worker.send(wrong, worker=Address("stranger", 2, "tcp://127.0.0.1:1"))
        worker.send(ghost(wrong, attempt="no-such-attempt"))
        worker.answer(submit)

    stage.worker("m0", incarnation=2, behave=haunted)
    assert text_of(complete(stage)) == oracle(stage)


def test_a_worker_that_wakes_up_after_its_request_moved_cannot_add_to_it(stage):
    asleep, awake = threading.Event(), threading.Event()

    def sleeper(worker, submit):
        worker.send(worker.item(submit, 0))
        worker.beating = False
        asleep.set()
        awake.wait(5)
        worker.beating = True
        for position in range(1, 12):
            worker.send(msgspec.structs.replace(worker.item(submit, position), tokens=(worker.letters["Z"],)))

    def slow(worker, submit):
        awake.set()
        for position in worker.positions(submit):
            worker.send(worker.item(submit, position))

    m0 = stage.worker("m0", behave=sleeper)
    stage.worker("m1", behave=slow, waiting=3, waiting_tokens=5000)
    assert text_of(complete(stage)) == oracle(stage)
    stage.until(lambda: m0.cancels == [m0.submits[0].attempt])
    stage.at_rest()


def test_a_lost_token_is_noticed_and_fetched_by_a_new_attempt(stage):
    def loses_one(worker, submit):
        for position in worker.positions(submit):
            if position != 5 or len(worker.submits) > 1:
                worker.send(worker.item(submit, position))

    m0 = stage.worker("m0", behave=loses_one)
    assert text_of(complete(stage)) == oracle(stage)
    assert [m0.begin(submit) for submit in m0.submits] == [0, 5]


def test_a_stop_string_ends_the_generation_and_both_workers_are_told(stage):
    whole = oracle(stage, 40)
    stop = whole[10:13]
    p0, d0 = stage.worker("p0", "prefill"), stage.worker("d0", "decode")
    response = complete(stage, 40, stop=[stop])
    cut = whole.index(stop)
    assert text_of(response) == whole[:cut]
    choice = response.json()["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    stage.until(lambda: p0.cancels == d0.cancels == [d0.submits[0].attempt])
    stage.at_rest()


def test_stopping_the_gateway_ends_requests_under_way_with_an_error(stage):
    stage.worker("m0", behave=silent)
    answers = []
    client = threading.Thread(target=lambda: answers.append(complete(stage)))
    client.start()
    stage.until(lambda: stage.workers[0].submits != [])
    stage.service.stop()
    client.join()
    assert answers[0].status_code == 503


def test_draining_waits_for_a_client_that_reads_slowly(stage):
    """Its generation is over long before its answer is: megabytes are still on their way when the drain begins."""
    stage.worker("m0", behave=lambda worker, submit: worker.send(worker.item(submit, 0, submit.sampling.max_tokens)))
    body = {"prompt": ["hi"] * 48, "max_tokens": 400, "logprobs": 20, "seed": 1, "stream": True}
    drained = []
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(stage.service.url.rpartition(":")[2])))
        content = json.dumps(body).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        client.sendall(head.encode() + content)
        stage.until(lambda: stage.invariants()["completed"] == 48, within_s=100)
        draining = threading.Thread(target=lambda: drained.append(stage.service.drain(60)))
        draining.start()
        stage.until(lambda: stage.http.get("/health").status_code == 503)
        assert drained == []
        received = bytearray()
        while not received.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            piece = client.recv(1 << 16)
            assert piece, "cut off"
            received = received[-64:] + piece
        draining.join()
    assert drained == [True]


def test_draining_refuses_new_requests_and_finishes_the_old(stage):
    go_on = threading.Event()

    def waits(worker, submit):
        go_on.wait(5)
        worker.answer(submit)

    stage.worker("m0", behave=waits)
    answers, drained = [], []
    client = threading.Thread(target=lambda: answers.append(complete(stage)))
    client.start()
    stage.until(lambda: stage.workers[0].submits != [])
    draining = threading.Thread(target=lambda: drained.append(stage.service.drain(10)))
    draining.start()
    stage.until(lambda: stage.http.get("/health").status_code == 503)
    refused = complete(stage)
    assert refused.status_code == 503
    assert refused.headers["retry-after"]
    go_on.set()
    client.join()
    draining.join()
    assert drained == [True]
    assert text_of(answers[0]) == oracle(stage)
