"""What the gateway adds to a token: CPU per streamed token, and time from a worker's send to bytes at the client.

Three processes on one machine: a fake worker that emits one token for each of N streams at a fixed step rate, the gateway
under test, and a client with N raw sockets. A token's text carries its number, and the worker notes when it sent each, on
CLOCK_MONOTONIC, which processes of one machine share; so the latency is exact and needs no synchronised clocks.

    python -m benchmarks.gateway_overhead --streams 64 --rate 40 --tokens 400
"""

from __future__ import annotations

import json
import multiprocessing as mp
import selectors
import socket
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import psutil
import typer
from rich.console import Console
from rich.table import Table

from core.config import parse_config
from core.cost import CostModel
from core.layout import KVLayout, LayerShape
from core.messages import Address, Heartbeat, Load, Submit, TokenItem, Tokens
from core.request import FinishReason
from mail.door import Door
from mail.keys import ClusterKeys
from mail.mailbox import Mailbox
from mail.peers import Peers

VOCAB = 2048
FIRST_NUMBER = 256


@dataclass(frozen=True)
class Result:
    """Milliseconds from the worker's send to the client's `recv`; CPU of the whole gateway process."""

    streams: int
    steps_per_s: float
    tokens: int
    gateway_cpu_us_per_token: float
    latency_p50_ms: float
    latency_p90_ms: float
    latency_p99_ms: float
    latency_max_ms: float


def _tokenizer_folder(folder: Path) -> None:
    """Token `FIRST_NUMBER + i` reads ` i`, so that the client can tell tokens apart."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {f"Ġ{index}": FIRST_NUMBER + index for index in range(VOCAB - FIRST_NUMBER)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": VOCAB}))


def _gateway(keys: ClusterKeys, folder: str, pipe: Connection) -> None:
    from gateway.gateway import Gateway

    config = parse_config({"model": folder, "gateway": {"port": 0}, "pools": [{"role": "mixed"}]})
    service = Gateway(config, keys, folder)
    service.start()
    pipe.send((service.address.mailbox, service.url))
    pipe.recv()
    service.stop()


def _worker(keys: ClusterKeys, endpoint: str, streams: int, rate: float, tokens: int, pipe: Connection) -> None:
    with Door(keys) as door:
        mailbox, peers = Mailbox(door), Peers(door)
        me = Address("worker", 1, mailbox.endpoint)
        attempts: list[str] = []
        while len(attempts) < streams:
            peers.send(endpoint, _heartbeat(me))
            mailbox.wait(0.1)
            while (message := mailbox.receive()) is not None:
                if isinstance(message, Submit):
                    attempts.append(message.attempt)
        sent_s: list[float] = []
        next_s = beat_s = time.monotonic()
        for step in range(tokens):
            time.sleep(max(0.0, next_s - time.monotonic()))
            next_s += 1 / rate
            finish = FinishReason.LENGTH if step == tokens - 1 else None
            items = tuple(
                TokenItem(attempt=attempt, position=step, tokens=(FIRST_NUMBER + step,), finish=finish) for attempt in attempts
            )
            sent_s.append(time.monotonic())
            peers.send(endpoint, Tokens(worker=me, items=items))
            if time.monotonic() - beat_s > 0.2:
                beat_s = time.monotonic()
                peers.send(endpoint, _heartbeat(me))
        pipe.send(sent_s)
        pipe.recv()
        peers.close()
        mailbox.close()


def _heartbeat(me: Address) -> Heartbeat:
    return Heartbeat(
        worker=me,
        role="mixed",
        accelerator="CPU",
        model="benchmark",
        fingerprint="f",
        layout=KVLayout.whole(layers=(LayerShape(2, 8, 8),), dtype="float32", block_size=16),
        total_blocks=1 << 20,
        capacity_tokens=1 << 24,
        max_model_len=1 << 16,
        max_num_seqs=4096,
        kv_endpoint="",
        cost=CostModel(),
        load=Load(free_blocks=1 << 20),
    )


def _read_streams(url: str, streams: int, tokens: int) -> list[tuple[int, float]]:
    """`(token number, when it was read)` of every token of every stream."""
    host, port = url.removeprefix("http://").rsplit(":", 1)
    body = json.dumps({"model": None, "prompt": [1, 2, 3], "max_tokens": tokens, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {host}\r\ncontent-length: {len(body)}\r\n\r\n".encode()
    selector = selectors.DefaultSelector()
    for _ in range(streams):
        client = socket.create_connection((host, int(port)))
        client.sendall(head + body)
        selector.register(client, selectors.EVENT_READ)
    arrivals: list[tuple[int, float]] = []
    open_streams = streams
    while open_streams:
        for key, _ in selector.select():
            stream = key.fileobj
            assert isinstance(stream, socket.socket)
            data = stream.recv(65536)
            now_s = time.monotonic()
            for piece in data.split(b'"text":" ')[1:]:
                arrivals.append((int(piece[: piece.index(b'"')]), now_s))
            if not data or b"[DONE]" in data:
                selector.unregister(stream)
                stream.close()
                open_streams -= 1
    return arrivals


def measure(streams: int, rate: float, tokens: int) -> Result:
    """Run the three processes once. Raises RuntimeError when tokens went missing."""
    context = mp.get_context("spawn")
    keys = ClusterKeys.generate()
    gateway_end, gateway_pipe = context.Pipe()
    worker_end, worker_pipe = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        _tokenizer_folder(Path(folder))
        gateway = context.Process(target=_gateway, args=(keys, folder, gateway_pipe), daemon=True)
        gateway.start()
        endpoint, url = gateway_end.recv()
        worker = context.Process(target=_worker, args=(keys, endpoint, streams, rate, tokens, worker_pipe), daemon=True)
        worker.start()
        _await_health(url)
        process = psutil.Process(gateway.pid)
        before = process.cpu_times()
        arrivals = _read_streams(url, streams, tokens)
        after = process.cpu_times()
        sent_s = worker_end.recv()
        for pipe in (worker_end, gateway_end):
            pipe.send("stop")
        for child in (worker, gateway):
            child.join(timeout=10)
    if len(arrivals) != streams * tokens:
        raise RuntimeError(f"expected {streams * tokens} tokens, read {len(arrivals)}")
    latencies_ms = sorted((arrived_s - sent_s[number]) * 1e3 for number, arrived_s in arrivals)
    cuts = statistics.quantiles(latencies_ms, n=100, method="inclusive")
    cpu_s = after.user + after.system - before.user - before.system
    return Result(streams, rate, len(arrivals), cpu_s / len(arrivals) * 1e6, cuts[49], cuts[89], cuts[98], latencies_ms[-1])


def _await_health(url: str) -> None:
    import httpx

    while httpx.get(f"{url}/health").status_code != 200:
        time.sleep(0.02)


def main(
    streams: Annotated[int, typer.Option(help="Concurrent streams.")] = 64,
    rate: Annotated[float, typer.Option(help="Steps a second; each gives every stream one token.")] = 40.0,
    tokens: Annotated[int, typer.Option(help="Tokens a stream.")] = 400,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Measure the gateway's overhead per streamed token."""
    result = measure(streams, rate, min(tokens, VOCAB - FIRST_NUMBER))
    if as_json:
        print(json.dumps(asdict(result)))
        return
    table = Table(title="Gateway overhead", show_header=False)
    for name, value in asdict(result).items():
        table.add_row(name.replace("_", " "), f"{value:,.2f}" if isinstance(value, float) else f"{value:,}")
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
