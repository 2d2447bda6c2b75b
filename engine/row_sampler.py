"""Stand-in for the sampler by rows: the sampler by sequences, over sequences of its own."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from core.sampling import SamplingParams
from engine.plan import Drawn
from engine.sampler import Sampled, Sampler
from engine.sequence import Sequence


@dataclass(frozen=True)
class Draws:
    tokens: torch.Tensor
    sampled: Sampled

    def read(self) -> tuple[tuple[Drawn, ...], dict[int, str]]:
        return self.sampled.drawn, self.sampled.faults


class RowSampler:
    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._sampler = Sampler(vocab_size, eos_token_ids)
        self._rows: dict[int, Sequence] = {}

    def admit(self, row: int, tokens: Rows[int], prompt_tokens: int, params: SamplingParams) -> None:
        self._rows[row] = Sequence(str(row), list(tokens), prompt_tokens, params)

    def drop(self, row: int) -> None:
        self._rows.pop(row, None)

    def draw(self, logits: torch.Tensor, rows: Rows[int], positions: Rows[int]) -> Draws:
        sequences = [self._rows[row] for row in rows]
        assert [sequence.output_tokens for sequence in sequences] == list(positions)
        sampled = self._sampler.sample(logits, sequences)
        tokens = [drawn.token for drawn in sampled.drawn]
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(max(0, token))
        return Draws(torch.tensor(tokens, dtype=torch.long, device=logits.device), sampled)
