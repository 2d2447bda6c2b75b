"""Any message between gateway and workers may be lost, repeated, late or overtaken: each request still ends in its exact tokens,
and nobody goes on with what nobody wants."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from core.messages import Cancel, Failed, Heartbeat, Keep, Message, Submit, Tokens
from mail.faults import Delay, Drop, Duplicate, Fault, Letter, Plan, RandomFaults, Reorder
from tests.gateway.conftest import LEASE_S, Stage
from tests.gateway.fake_worker import FakeWorker, expected_text

PROMPT = "tell me"
SetStage = Callable[..., Stage]


def complete(stage: Stage, seed: int = 5, tokens: int = 12, **fields: object):
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": tokens, "seed": seed, **fields}
    return stage.http.post("/v1/completions", json=body)


def exact(stage: Stage, response, seed: int = 5, tokens: int = 12) -> None:
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["text"] == expected_text(stage.ids(PROMPT), seed, tokens)


def once(hit: Callable[[Letter], bool], fault: Fault) -> Plan:
    """The first message that `hit` is true of suffers `fault`."""
    done = threading.Event()

    def plan(letter: Letter) -> Fault | None:
        if done.is_set() or not hit(letter):
            return None
        done.set()
        return fault

    plan.done = done
    return plan


def last_tokens(letter: Letter) -> bool:
    return isinstance(letter.message, Tokens) and any(item.finish for item in letter.message.items)


def tokens_at(position: int, sender: str) -> Callable[[Letter], bool]:
    return lambda letter: (
        letter.sender == sender
        and isinstance(letter.message, Tokens)
        and any(item.position == position for item in letter.message.items)
    )


def of_kind(kind: type[Message], to: str = "") -> Callable[[Letter], bool]:
    """Messages of a kind; of `Submit`, those for the stage `to`."""
    return lambda letter: isinstance(letter.message, kind) and (not to or letter.message.stage == to)


def needs(lost: str) -> Callable[[FakeWorker, Submit], None]:
    """A decode worker whose prefill side heard nothing of the first attempt has no KV to decode from."""

    def behave(worker: FakeWorker, submit: Submit) -> None:
        if lost != "prefill" or not submit.attempt.endswith("-1"):
            worker.answer(submit)

    return behave


def silent(worker: FakeWorker, submit: Submit) -> None:
    """Takes the work and never answers."""


def test_the_last_tokens_of_a_stream_are_sent_again_when_they_did_not_arrive(set_stage: SetStage) -> None:
    stage = set_stage(plan=once(last_tokens, Drop()))
    m0 = stage.worker("m0")
    exact(stage, complete(stage))
    assert len(m0.submits) == 1
    assert [item.position for item in m0.repaired] == [11]
    stage.at_rest()


@pytest.mark.parametrize("position", [0, 1, 6])
def test_tokens_lost_in_the_middle_of_a_stream_are_sent_again_by_who_has_them(set_stage: SetStage, position: int) -> None:
    sender = "p0" if position == 0 else "d0"
    stage = set_stage(plan=once(tokens_at(position, sender), Drop()))
    p0, d0 = stage.worker("p0", "prefill"), stage.worker("d0", "decode")
    exact(stage, complete(stage))
    assert len(p0.submits) == len(d0.submits) == 1
    assert position in [item.position for item in (p0 if position == 0 else d0).repaired]
    stage.at_rest()


@pytest.mark.parametrize("lost", ["prefill", "decode", "local"])
def test_a_lost_submit_is_noticed_and_the_request_goes_on_elsewhere(set_stage: SetStage, lost: str) -> None:
    stage = set_stage(plan=once(of_kind(Submit, to=lost), Drop()))
    if lost == "local":
        missing = stage.worker("m0")
    else:
        p0, d0 = stage.worker("p0", "prefill"), stage.worker("d0", "decode", behave=needs(lost))
        missing = p0 if lost == "prefill" else d0
    exact(stage, complete(stage))
    lost_attempt = next(said.attempt for said in missing.repaired if isinstance(said, Failed) and said.code == "attempt_lost")
    assert lost_attempt.endswith("-1")
    assert [submit.attempt for submit in missing.submits if submit.attempt == lost_attempt] == []
    stage.at_rest()


def test_a_lost_failure_is_told_again(set_stage: SetStage) -> None:
    stage = set_stage(plan=once(of_kind(Failed), Drop()))
    m0 = stage.worker("m0", behave=lambda worker, submit: worker.fail(submit, "engine_fault"))
    stage.worker("m1", waiting=3, waiting_tokens=5000)
    exact(stage, complete(stage))
    assert [said.code for said in m0.repaired if isinstance(said, Failed)][:1] == ["engine_fault"]
    stage.at_rest()


def test_a_worker_whose_cancel_was_lost_stops_within_a_lease(set_stage: SetStage) -> None:
    stage = set_stage(plan=once(of_kind(Cancel), Drop()), gateway={"port": 0, "request_timeout_s": LEASE_S})
    m0 = stage.worker("m0", behave=silent)
    assert complete(stage).status_code == 504
    stage.until(lambda: m0.expired == [m0.submits[0].attempt])
    assert m0.cancels == []
    stage.at_rest()


def test_a_request_that_is_slow_and_not_lost_is_kept_for_as_long_as_it_takes(stage: Stage) -> None:
    p0, d0 = stage.worker("p0", "prefill", behave=silent), stage.worker("d0", "decode", behave=silent)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(complete(stage)))
    asking.start()
    stage.until(lambda: p0.submits != [] and d0.submits != [])
    attempt = d0.submits[0].attempt
    for worker in (p0, d0):  # three leases long
        stage.until(lambda worker=worker: sum(attempt in [item.attempt for item in keep.wanted] for keep in worker.keeps) >= 15)
    assert p0.expired == d0.expired == []
    for worker in (p0, d0):
        worker.later(lambda worker=worker: worker.answer(worker.submits[0]))
    asking.join()
    exact(stage, answers[0])
    assert len(d0.submits) == 1


def test_a_gateway_that_is_gone_is_worked_for_no_longer_than_a_lease(set_stage: SetStage) -> None:
    stage = set_stage(
        plan=lambda letter: Drop() if letter.sender == "gateway" and isinstance(letter.message, Keep | Cancel) else None
    )
    m0 = stage.worker("m0", behave=silent)
    asking = threading.Thread(target=complete, args=(stage,))
    asking.start()
    stage.until(lambda: m0.submits != [])
    stage.until(lambda: m0.expired == [m0.submits[0].attempt])
    stage.service.stop()
    asking.join()


EVERY_FAULT = (Drop(), Delay(0.05), Delay(0.4), Duplicate(), Duplicate(after_s=0.3), Reorder(0.2))
KINDS: dict[str, tuple[type[Message], ...]] = {
    "submit": (Submit,),
    "keep": (Keep,),
    "cancel": (Cancel,),
    "tokens": (Tokens,),
    "failed": (Failed,),
    "heartbeat": (Heartbeat,),
    "anything": (),
}


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_befalls_a_third_of_the_messages_every_request_ends_in_its_exact_tokens(set_stage: SetStage, kind: str) -> None:
    share = 0.1 if kind == "anything" else 0.3
    plan = RandomFaults(seed=11, share=share, faults=EVERY_FAULT, of=KINDS[kind])
    health = {"dead_after_s": 2.0, "stuck_after_s": 2.0, "heartbeat_s": 0.03}
    stage = set_stage(plan=plan, gateway={"port": 0, "max_attempts": 12}, health=health)

    def moody(worker: FakeWorker, submit: Submit) -> None:
        """Fails one in four, and stops for a while in another."""
        mood = submit.sampling.seed % 4
        if mood == 0 and submit.attempt.endswith("-1"):
            worker.fail(submit, "engine_fault")
        else:
            worker.answer(submit)

    for name, role in (("p0", "prefill"), ("p1", "prefill"), ("d0", "decode"), ("d1", "decode")):
        stage.worker(name, role, behave=moody)
    stop = expected_text(stage.ids(PROMPT), 3, 12)[4:7]
    with ThreadPoolExecutor(8) as pool:
        plain = pool.map(lambda seed: (seed, complete(stage, seed)), range(24))
        cut = pool.map(lambda _: complete(stage, 3, stop=[stop]), range(8))
        for seed, response in plain:
            exact(stage, response, seed)
        for response in cut:
            assert response.status_code == 200, response.text
            assert response.json()["choices"][0]["text"] == expected_text(stage.ids(PROMPT), 3, 12).split(stop)[0]
    stage.at_rest()
    for worker in stage.workers:  # ended, cancelled, or no longer asked for
        stage.until(lambda worker=worker: worker.working == [])


@pytest.mark.parametrize(
    "fault", [Drop(), Delay(0.2), Duplicate(after_s=0.3), Reorder(0.3)], ids=lambda fault: type(fault).__name__
)
@pytest.mark.parametrize("kind", [Submit, Tokens, Failed], ids=lambda kind: kind.__name__)
def test_every_other_message_of_a_kind_may_suffer(set_stage: SetStage, kind: type[Message], fault: Fault) -> None:
    def plan(letter: Letter) -> Fault | None:
        return fault if isinstance(letter.message, kind) and letter.number % 2 == 0 else None

    stage = set_stage(plan=plan, gateway={"port": 0, "max_attempts": 12})

    def fails_first(worker: FakeWorker, submit: Submit) -> None:
        if submit.attempt.endswith("-1"):
            worker.fail(submit, "engine_fault")
        else:
            worker.answer(submit)

    for name in ("m0", "m1"):
        stage.worker(name, behave=fails_first)
    exact(stage, complete(stage))
    stage.at_rest()
