"""Repetition, presence and frequency penalties, from counts kept on the device for each row that has any.

A drawn token changes the counts at that token alone, and it does so on the device: a step's work does not grow with the
context, and the host need not know the token. What is kept is a function of the row's tokens alone, so a row that is admitted
with its output so far is equal to one that drew that output here.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from core.sampling import SamplingParams
from engine.sampling.host import put, some, upload


class Penalties:
    """Counts over one vocabulary on one device. Rows without penalties keep none."""

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._params: dict[int, SamplingParams] = {}
        self._counts = _Table(vocab_size, 0.0, device)  # of output tokens, for presence and frequency
        self._scales = _Table(vocab_size, 1.0, device)  # the repetition penalty where a token was seen, 1 elsewhere

    @property
    def kept(self) -> int:
        """How many times a vocabulary of numbers is kept."""
        return len(self._counts.slots) + len(self._scales.slots)

    def admit(self, row: int, tokens: Rows[int], prompt_tokens: int, params: SamplingParams) -> None:
        """Keep what `params` need of `tokens`, prompt and output. The row must be new here."""
        if params.repetition_penalty != 1.0:
            seen = upload(tokens, torch.long, self._device)
            self._scales.take(row).index_fill_(0, seen, params.repetition_penalty)
            self._params[row] = params
        if params.presence_penalty or params.frequency_penalty:
            output = upload(tokens[prompt_tokens:], torch.long, self._device)
            self._counts.take(row).index_add_(0, output, torch.ones_like(output, dtype=torch.float32))
            self._params[row] = params

    def drop(self, row: int) -> None:
        """Forget the row, if it is kept."""
        if self._params.pop(row, None) is not None:
            self._counts.free(row)
            self._scales.free(row)

    def apply(self, scores: torch.Tensor, rows: Rows[int]) -> None:
        """Change `scores[n, vocab]` (fp32) of `rows[n]` in place."""
        repeated = self._places(rows, self._scales)
        if repeated:
            chosen, scales = some(scores, repeated), self._scales.of([rows[place] for place in repeated])
            above = chosen.clamp(min=0).div_(scales)  # one of the two is 0, so their sum is exact
            put(scores, repeated, chosen.clamp_(max=0).mul_(scales).add_(above))
        counted = self._places(rows, self._counts)
        if counted:
            chosen, counts = some(scores, counted), self._counts.of([rows[place] for place in counted])
            frequency, presence = (self._of(rows, counted, name) for name in ("frequency_penalty", "presence_penalty"))
            penalty = counts * frequency[:, None]
            penalty.addcmul_(counts.clamp(max=1), presence[:, None])
            put(scores, counted, chosen.sub_(penalty))

    def count(self, rows: Rows[int], tokens: torch.Tensor) -> None:
        """Note `tokens` (int64 `[n]` on the device; -1: none) as output of `rows[n]`, each of which occurs once."""
        counted = self._places(rows, self._counts)
        if counted:
            drawn, at = self._drawn(rows, counted, tokens, self._counts)
            self._counts.values.index_put_(at, drawn.float(), accumulate=True)
        repeated = self._places(rows, self._scales)
        if repeated:
            drawn, at = self._drawn(rows, repeated, tokens, self._scales)
            scale = self._of(rows, repeated, "repetition_penalty")
            self._scales.values.index_put_(at, torch.where(drawn, scale, self._scales.values[at]))

    def _drawn(
        self, rows: Rows[int], places: list[int], tokens: torch.Tensor, table: _Table
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Whether a token was drawn, and where in the table it is."""
        chosen = some(tokens, places)
        return chosen >= 0, (table.index([rows[place] for place in places]), chosen.clamp(min=0))

    def _places(self, rows: Rows[int], table: _Table) -> list[int]:
        return [place for place, row in enumerate(rows) if row in table.slots] if table.slots else []

    def _of(self, rows: Rows[int], places: list[int], name: str) -> torch.Tensor:
        return upload([getattr(self._params[rows[place]], name) for place in places], torch.float32, self._device)


class _Table:
    """fp32 `values[capacity, vocab]`: a vocabulary of numbers for each row that took a slot. Doubles when it is full."""

    def __init__(self, vocab_size: int, neutral: float, device: torch.device) -> None:
        self._neutral = neutral
        self._free: list[int] = []
        self.values = torch.empty((0, vocab_size), dtype=torch.float32, device=device)
        self.slots: dict[int, int] = {}

    def take(self, row: int) -> torch.Tensor:
        """`[vocab]`, all neutral: the row's own from now on."""
        if not self._free:
            held = len(self.values)
            more = max(1, held)
            self.values = torch.cat([self.values, self.values.new_empty((more, self.values.shape[1]))])
            self._free = list(range(held + more - 1, held - 1, -1))
        slot = self.slots[row] = self._free.pop()
        return self.values[slot].fill_(self._neutral)

    def free(self, row: int) -> None:
        """Give the row's slot back, if it has one."""
        slot = self.slots.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def index(self, rows: list[int]) -> torch.Tensor:
        """int64 `[n]`: their slots, on the device."""
        return upload([self.slots[row] for row in rows], torch.long, self.values.device)

    def of(self, rows: list[int]) -> torch.Tensor:
        """`[n, vocab]`, to be read only."""
        return self.values[self.slots[rows[0]]][None] if len(rows) == 1 else self.values.index_select(0, self.index(rows))
