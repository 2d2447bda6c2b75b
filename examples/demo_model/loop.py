"""The training loop: a step at a time, from a stream of tokens, with checkpoints that a killed run goes on from.

Invariant: the state after step `n` is a function of the run's `Identity` and `n` alone. Batches are named by step, nothing
is drawn at random after the weights are made, and a checkpoint holds all the rest, so a run that was killed and resumed
has the losses of one that was not (exactly, on one thread in float32).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from examples.demo_model.model import ModelSize, make_model
from examples.demo_model.packing import Stream
from examples.demo_model.recipe import Recipe, make_optimizer

HELD_OUT_BATCHES = 8
FINAL_STEPS = 100
"""Over which the final training loss is averaged."""


class CheckpointMismatch(ValueError):
    """A checkpoint is of another run than the one that should go on from it."""


@dataclass(frozen=True)
class Identity:
    """What a run's outcome depends on. `precision` is what products are computed in: float32 or bfloat16."""

    size: ModelSize
    recipe: Recipe
    seed: int
    precision: str
    corpus: str
    tokenizer: str


@dataclass
class Record:
    """What a run has seen: a loss for each step taken, held-out losses as (steps taken, loss), and its time, pauses left out."""

    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def step(self) -> int:
        return len(self.losses)

    @property
    def final_loss(self) -> float:
        last = self.losses[-FINAL_STEPS:]
        return sum(last) / len(last)


class Training:
    """A model under training. One owner, one thread; steps go up from 0."""

    def __init__(self, identity: Identity, train: Stream, held_out: Stream, *, compiled: bool) -> None:
        self.identity, self.recipe = identity, identity.recipe
        self.model: PreTrainedModel = make_model(identity.size, identity.seed)
        self.optimizer = make_optimizer(self.model, self.recipe)
        self.record = Record()
        self._train, self._held_out = train, held_out
        self._loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = self._forward
        if compiled:
            self._loss = torch.compile(self._forward, dynamic=False)

    @property
    def done(self) -> bool:
        return self.record.step >= self.recipe.steps

    def advance(self) -> float:
        """Take one step; returns its loss in nats a token."""
        began_s = time.perf_counter()
        step = self.record.step
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate_at(step)
        loss = self._loss(*self._train.batch(step, self.recipe.batch_tokens, self.recipe.block_at(step)))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.record.losses.append(loss.item())
        self.record.seconds += time.perf_counter() - began_s
        return self.record.losses[-1]

    def measure(self) -> float:
        """The loss over the beginning of the held-out stream, in nats a token; recorded too."""
        began_s = time.perf_counter()
        block = self.recipe.block_at(max(self.record.step - 1, 0))  # a compiled step is at hand for this shape alone
        total = 0.0
        for batch in range(HELD_OUT_BATCHES):
            total += self._loss(*self._held_out.batch(batch, self.recipe.batch_tokens, block)).item()
        self.record.held_out.append((self.record.step, total / HELD_OUT_BATCHES))
        self.record.seconds += time.perf_counter() - began_s
        return self.record.held_out[-1][1]

    def save(self, path: Path) -> None:
        """Write a checkpoint aside and put it in the place of the one before: `path` is a whole checkpoint at any time."""
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(".partial")
        state = {
            "identity": asdict(self.identity),
            "record": asdict(self.record),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with aside.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    def load(self, path: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            CheckpointMismatch: it is of another run; says what differs.
            FileNotFoundError: there is none.
        """
        state: dict[str, Any] = torch.load(path, weights_only=True)
        mine, theirs = asdict(self.identity), state["identity"]
        unlike = [name for name in mine if mine[name] != theirs.get(name)]
        if unlike:
            raise CheckpointMismatch(f"{path}: the checkpoint is of a run with another {', '.join(unlike)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.record = Record(**state["record"])

    def _forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Mean cross entropy of `[rows, block]` targets."""
        with self._precision():
            hidden = self.model.model(input_ids=inputs, use_cache=False).last_hidden_state
            logits = functional.linear(hidden, self.model.lm_head.weight).flatten(0, 1)
            return functional.cross_entropy(logits.float(), targets.flatten())

    def _precision(self) -> AbstractContextManager[object]:
        if self.identity.precision == "bfloat16":
            return torch.autocast("cpu", torch.bfloat16)
        return nullcontext()
