"""Log-probabilities of the model's own distribution, before penalties, temperature and filters."""

from __future__ import annotations

from collections.abc import Sequence as Rows

import torch

from engine.results import TokenLogprobs
from engine.sampling.host import Fetch, some


class Logprobs:
    """Those of one step's rows that ask, on their way to the host."""

    def __init__(self, logits: torch.Tensor, tokens: torch.Tensor, wanted: Rows[int | None]) -> None:
        """For `logits[n, vocab]` and drawn `tokens[n]` (-1: none); `wanted[n]` alternatives, None for no report."""
        self._wanted = {row: count for row, count in enumerate(wanted) if count is not None}
        self._fetch: Fetch | None = None
        if self._wanted:
            rows = list(self._wanted)
            table = torch.log_softmax(some(logits, rows).float(), dim=-1)
            own = table.gather(1, some(tokens, rows)[:, None].clamp(min=0))[:, 0]
            top = table.topk(min(logits.shape[1], max(self._wanted.values())), dim=-1)
            self._fetch = Fetch(own, top.values, top.indices)

    def read(self) -> dict[int, TokenLogprobs]:
        """By row; waits until they are here."""
        if self._fetch is None:
            return {}
        own, values, tokens = (part.tolist() for part in self._fetch.wait())
        return {
            row: TokenLogprobs(own[i], tuple(zip(tokens[i][:count], values[i][:count], strict=True)))
            for i, (row, count) in enumerate(self._wanted.items())
        }
