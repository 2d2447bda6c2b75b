"""What every transport owes the protocol: order, wholeness, and a close that wakes whoever waits."""

from __future__ import annotations

import threading
from collections.abc import Callable

import psutil
import pytest

from core.errors import TransferError
from kv_transfer.transport import Connection, Transport
from kv_transfer.transports.fault import FaultTransport
from kv_transfer.transports.inproc import InprocTransport
from kv_transfer.transports.tcp import TcpTransport, split_endpoint

MAKERS: list[Callable[[], Transport]] = [
    TcpTransport,
    InprocTransport,
    lambda: TcpTransport(buffer_bytes=1 << 16),
    lambda: FaultTransport(InprocTransport(), lambda message: None),
]


@pytest.fixture(params=MAKERS, ids=["tcp", "inproc", "tcp-small-buffers", "fault-free"])
def transport(request: pytest.FixtureRequest) -> Transport:
    made: Transport = request.param()
    return made


def joined(transport: Transport) -> tuple[Connection, Connection]:
    listener = transport.listen()
    near = transport.connect(listener.endpoint)
    far = listener.accept()
    listener.close()
    return near, far


def test_bytes_arrive_whole_and_in_order(transport: Transport) -> None:
    near, far = joined(transport)
    data = bytes(range(256)) * 20_000
    parts = [data[:48], memoryview(data)[48:3_000_000], b"", bytearray(data[3_000_000:])]
    thread = threading.Thread(target=near.send, args=(parts,))
    thread.start()
    got = bytearray(len(data))
    for start, stop in ((0, 1), (1, 49), (49, 2_500_000), (2_500_000, len(data))):
        far.recv_into(memoryview(got)[start:stop])
    thread.join(20)
    assert got == data
    near.close()
    far.close()


def test_messages_of_several_threads_do_not_mix(transport: Transport) -> None:
    near, far = joined(transport)
    size, each = 100_000, 10
    threads = [
        threading.Thread(target=lambda fill=fill: [near.send([bytes([fill]) * size]) for _ in range(each)]) for fill in range(3)
    ]
    for thread in threads:
        thread.start()
    counts = [0, 0, 0]
    for _ in range(3 * each):
        got = bytearray(size)
        far.recv_into(memoryview(got))
        assert len(set(got)) == 1
        counts[got[0]] += 1
    assert counts == [each] * 3
    for thread in threads:
        thread.join(20)
    near.close()
    far.close()


def test_close_wakes_a_receiver_and_a_sender_that_wait(transport: Transport) -> None:
    near, far = joined(transport)
    failures: list[BaseException] = []
    receiving, sending = threading.Event(), threading.Event()

    def receive() -> None:
        receiving.set()
        try:
            near.recv_into(memoryview(bytearray(1)))
        except TransferError as error:
            failures.append(error)

    def send() -> None:
        sending.set()
        try:
            near.send([bytes(64 << 20)])  # more than any buffer takes
        except TransferError as error:
            failures.append(error)

    threads = [threading.Thread(target=receive), threading.Thread(target=send)]
    for thread in threads:
        thread.start()
    assert receiving.wait(20)
    assert sending.wait(20)
    near.close()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert len(failures) == 2
    with pytest.raises(TransferError):
        near.send([b"x"])
    far.close()


def test_the_far_end_sees_the_end_of_the_stream(transport: Transport) -> None:
    near, far = joined(transport)
    near.send([b"abc"])
    near.close()
    near.close()
    with pytest.raises(TransferError, match="3 of 4"):
        far.recv_into(memoryview(bytearray(4)))
    far.close()


def test_a_send_that_may_not_wait_fails_when_the_peer_does_not_read(transport: Transport) -> None:
    near, far = joined(transport)

    def send_until_refused() -> None:
        for _ in range(10_000):
            near.send([bytes(100_000)], wait=False)

    with pytest.raises(TransferError, match="does not read"):
        send_until_refused()
    far.close()


def test_closing_a_listener_wakes_accept_and_frees_the_endpoint(transport: Transport) -> None:
    listener = transport.listen()
    ended: list[TransferError] = []
    waiting = threading.Event()

    def accept() -> None:
        waiting.set()
        try:
            listener.accept()
        except TransferError as error:
            ended.append(error)

    thread = threading.Thread(target=accept)
    thread.start()
    assert waiting.wait(20)
    listener.close()
    thread.join(20)
    assert len(ended) == 1
    with pytest.raises(TransferError):
        transport.connect(listener.endpoint)


def test_no_descriptor_is_left_behind(transport: Transport) -> None:
    before = psutil.Process().num_fds()
    for _ in range(20):
        near, far = joined(transport)
        near.close()
        far.close()
    listener = transport.listen()
    never_accepted = transport.connect(listener.endpoint)
    listener.close()
    never_accepted.close()
    assert psutil.Process().num_fds() == before


@pytest.mark.parametrize("endpoint", ["", "host", ":1", "host:", "host:0", "host:65536", "host:-1", "host:1x", "h:\u0661"])
def test_an_endpoint_that_is_none_is_a_transfer_error(endpoint: str) -> None:
    with pytest.raises(TransferError, match="endpoint"):
        split_endpoint(endpoint)


def test_endpoints_are_host_and_port() -> None:
    assert split_endpoint("worker-1.pool:7001") == ("worker-1.pool", 7001)
    assert split_endpoint("[::1]:7001") == ("::1", 7001)


def test_a_port_in_use_is_a_transfer_error() -> None:
    listener = TcpTransport().listen()
    port = split_endpoint(listener.endpoint)[1]
    with pytest.raises(TransferError, match="cannot listen"):
        TcpTransport(port=port).listen()
    listener.close()


def test_the_advertised_host_is_what_peers_are_told() -> None:
    listener = TcpTransport(advertise="gpu-7").listen()
    assert listener.endpoint.startswith("gpu-7:")
    listener.close()
