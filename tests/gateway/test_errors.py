from __future__ import annotations

import pytest

from core.errors import (
    ContextLengthExceeded,
    DeadlineExceeded,
    EngineFault,
    HetServeError,
    InvalidRequest,
    ModelNotFound,
    Overloaded,
    PayloadTooLarge,
    ReadTimeout,
    TransferAborted,
    Unauthorized,
    Unavailable,
    WorkerLost,
)
from gateway.http.errors import headers_of
from hetserve.retries import may_retry

PASSING = [Overloaded("full"), Unavailable("draining"), ReadTimeout("slow"), WorkerLost("gone")]
LASTING = [
    InvalidRequest("no"),
    ContextLengthExceeded("long"),
    Unauthorized("who"),
    ModelNotFound("which"),
    PayloadTooLarge("big"),
    DeadlineExceeded("late"),
    HetServeError("bug"),
]


def exhausted(error: HetServeError) -> HetServeError:
    error.exhausted = True
    return error


@pytest.mark.parametrize("error", PASSING, ids=lambda error: error.code)
def test_clients_are_told_to_retry_what_passes(error):
    assert headers_of(error)["x-should-retry"] == "true"
    assert may_retry(error.status, headers_of(error))


@pytest.mark.parametrize("error", LASTING, ids=lambda error: error.code)
def test_clients_are_told_not_to_retry_what_stays(error):
    assert headers_of(error)["x-should-retry"] == "false"
    assert not may_retry(error.status, headers_of(error))


@pytest.mark.parametrize("kind", [WorkerLost, EngineFault, TransferAborted, Unavailable], ids=lambda kind: kind.code)
def test_what_the_gateway_has_retried_to_the_end_is_not_retried_by_clients(kind):
    assert headers_of(exhausted(kind("again")))["x-should-retry"] == "false"


def test_full_queues_are_worth_coming_back_to_whoever_says_so():
    headers = headers_of(exhausted(Overloaded("full", retry_after_s=7)))
    assert (headers["x-should-retry"], headers["retry-after"]) == ("true", "7")
