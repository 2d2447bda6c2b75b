"""Tokenizers made on the spot and a gateway with fake workers, so that gateway tests need no model and no engine."""

from __future__ import annotations

import json
import string
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from core.config import parse_config
from gateway.gateway import Gateway
from mail.door import Door
from mail.faults import AlarmClock, FaultyPeers, Plan
from mail.keys import ClusterKeys
from mail.peers import MessageSender, Peers
from tests.gateway.fake_worker import FakeWorker


@pytest.fixture(scope="session")
def byte_level() -> Tokenizer:
    """Ids 0 to 255 are single bytes, then some words; `<|end|>` and friends are special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>", "<|system|>"])
    return tokenizer


@pytest.fixture(scope="session")
def byte_fallback() -> Tokenizer:
    """SentencePiece-like: words carry their leading space, unknown characters fall back to byte tokens."""
    vocab = {"<unk>": 0, **{f"<0x{byte:02X}>": byte + 1 for byte in range(256)}}
    for piece in ("▁Hello", "▁world", "lo", "▁", "a", "b", "▁the", "é"):
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


CHAT_TEMPLATE = (
    "{% if reasoning_effort %}{{ '[' + reasoning_effort + ']' }}{% endif %}"
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' }}{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@pytest.fixture(scope="session")
def model_path(byte_level: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a gateway needs of a model."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level,
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>", "<|system|>"],
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"vocab_size": 264}))
    return folder


LEASE_S = 0.6


class Stage:
    """A running gateway and the fake workers that play on it. With a `plan`, all their mail misbehaves."""

    def __init__(self, model_path: Path, letters: dict[str, int], settings: dict[str, Any], plan: Plan | None = None) -> None:
        self.keys = ClusterKeys.generate()
        self.letters = letters
        pools = [{"role": "mixed"}]
        health = {"dead_after_s": 0.4, "stuck_after_s": 0.5, "heartbeat_s": 0.03}
        transfer = {"lease_s": LEASE_S}
        self.config = parse_config({"model": "tiny", "pools": pools, "health": health, "transfer": transfer, **settings})
        self.plan = plan
        self.alarm = AlarmClock()
        self.service = Gateway(self.config, self.keys, model_path, make_peers=lambda door: self.peers(door, "gateway"))
        self.service.start()
        self.workers: list[FakeWorker] = []
        key = self.config.gateway.api_key
        headers = {"authorization": f"Bearer {key}"} if key else {}
        self.http = httpx.Client(base_url=self.service.url, headers=headers, timeout=20)

    def worker(self, name: str, role: str = "mixed", **options: Any) -> FakeWorker:
        """Add a worker and wait until the gateway knows it."""
        options = {"lease_s": LEASE_S, "make_peers": lambda door: self.peers(door, name), **options}
        worker = FakeWorker(self.keys, self.service.address, name, role, self.letters, **options)
        self.workers.append(worker)
        self.until(lambda: worker.address in [item.address for item in self.service.snapshot().instances])
        return worker

    def peers(self, door: Door, name: str) -> MessageSender:
        return Peers(door) if self.plan is None else FaultyPeers(Peers(door), self.plan, self.alarm.later, name)

    def until(self, holds: Callable[[], bool], within_s: float = 10.0) -> None:
        """Wait for something that must become true."""
        deadline_s = time.monotonic() + within_s
        while not holds():
            assert time.monotonic() < deadline_s, "did not become true"
            time.sleep(0.005)

    def invariants(self) -> dict[str, int]:
        return self.http.get("/debug/invariants").json()

    def at_rest(self) -> None:
        """Nothing is left of any request, and every accepted one ended in exactly one way."""
        moving = ("in_flight", "journal_open", "attempts", "instances_with_work", "held", "pump_attempts")
        self.until(lambda: all(self.invariants()[name] == 0 for name in moving))
        counts = self.invariants()
        assert counts["accepted"] == counts["completed"] + counts["failed"] + counts["cancelled"]
        assert counts["malformed_messages"] == 0

    def ids(self, text: str) -> list[int]:
        return [self.letters[char] for char in text]

    def close(self) -> None:
        self.http.close()
        for worker in self.workers:
            worker.stop()
        self.service.stop()
        self.alarm.close()


@pytest.fixture(scope="session")
def letters(byte_level: Tokenizer) -> dict[str, int]:
    return {char: byte_level.encode(char, add_special_tokens=False).ids[0] for char in string.printable}


@pytest.fixture
def set_stage(model_path: Path, letters: dict[str, int]) -> Iterator[Callable[..., Stage]]:
    """Starts gateways; keyword arguments are sections of the configuration, and `plan`."""
    stages: list[Stage] = []

    def start(plan: Plan | None = None, **settings: Any) -> Stage:
        settings.setdefault("gateway", {"port": 0})
        stages.append(Stage(model_path, letters, settings, plan))
        return stages[-1]

    yield start
    for stage in stages:
        stage.close()


@pytest.fixture
def stage(set_stage: Callable[..., Stage]) -> Stage:
    return set_stage()
