"""Slow and numerous clients, on raw sockets."""

from __future__ import annotations

import json
import socket
import threading

import pytest

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def connect(stage):
    port = int(stage.service.url.rsplit(":", 1)[1])
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def rest(client):
    """Everything until the server hangs up."""
    answer = b""
    while part := client.recv(65536):
        answer += part
    return answer


def error_of(answer, status):
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 %d " % status), answer
    assert b"\r\nconnection: close" in head
    return json.loads(body)["error"]


@pytest.fixture
def hasty(set_stage):
    stage = set_stage(gateway={"port": 0, "read_timeout_s": 0.2})
    stage.worker("m0")
    return stage


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST /v1/comp",
        HEAD,
        HEAD + b"x-slow: ",
        HEAD + b"content-length: 100\r\n\r\n",
        HEAD + b'content-length: 100\r\n\r\n{"prompt": ',
        HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\n{}   \r\n",
    ],
)
def test_a_request_that_does_not_arrive_in_time_is_a_408_and_the_connection_ends(hasty, sent):
    with connect(hasty) as client:
        client.sendall(sent)
        error = error_of(rest(client), 408)
    assert error["code"] == "read_timeout"
    assert hasty.workers[0].submits == []
    hasty.at_rest()


def test_a_body_that_nobody_reads_does_not_keep_a_connection_open(hasty):
    with connect(hasty) as client:
        client.sendall(b"POST /nope HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        assert rest(client).startswith(b"HTTP/1.1 404")


def test_a_second_request_on_a_connection_has_its_own_time(hasty):
    with connect(hasty) as client:
        client.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        client.sendall(b"GET /vers")
        assert error_of(rest(client), 408)["code"] == "read_timeout"


def test_an_answer_may_take_longer_than_its_request(hasty):
    go_on = threading.Event()

    def slow(worker, submit):
        go_on.wait(10)
        worker.answer(submit)

    hasty.workers[0].behave = slow
    body = b'{"prompt": "hi"}'
    with connect(hasty) as idle, connect(hasty) as client:
        client.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        hasty.until(lambda: hasty.workers[0].submits != [])
        rest(idle)  # the limit has passed
        go_on.set()
        assert client.recv(65536).startswith(b"HTTP/1.1 200")


def test_connections_beyond_the_limit_are_turned_away_until_one_ends(set_stage):
    stage = set_stage(gateway={"port": 0, "max_connections": 2})
    assert stage.http.get("/version").status_code == 200  # and stays open
    with connect(stage), connect(stage) as third:
        answer = rest(third)
        assert error_of(answer, 503)["message"] == "too many connections"
        assert b"retry-after: 1" in answer
        assert stage.http.get("/version").status_code == 200

    def let_in():
        with connect(stage) as client:
            client.sendall(b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
            return rest(client).startswith(b"HTTP/1.1 200")

    stage.until(let_in)
