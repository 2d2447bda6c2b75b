"""Temperature, `min_p`, `top_k` and `top_p`: from scores to log-weights, relative to the likeliest token's 0.

Each filter, in that order (vLLM's), keeps what is not below a *value*, and so every token that ties with it; together they are
one floor per row. `min_p` is a floor as it stands, `top_k` a selection. `top_p` needs the mass of everything left, and then
only an order of its head:

- Of `n` tokens that may lose mass `s` together, all those below `s / n` can go at once: together they are less than `s`.
  Only what is left is sorted (`floor_on_host`).
- A GPU cannot look at what is left without waiting. There a `top_k` that is small enough bounds it; otherwise all is sorted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from core.sampling import SamplingParams
from engine.sampling.host import put, some, upload

_LEAST_TEMPERATURE = 1e-30  # below it, 1 / temperature is no fp32 number; the best tokens win anyway
_SMALL_TOP_K = 1024
_STRIDE = 256

_Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class LogWeights:
    """Turns scores of `n` rows into log-weights, which rise with the score; all `[n, 1]`, fp32.

    Attributes:
        best: the largest score.
        temperature: above 0.
        floor: the least log-weight that is kept; None keeps all.
    """

    best: torch.Tensor
    temperature: torch.Tensor
    floor: torch.Tensor | None = None

    @classmethod
    def of(cls, best: torch.Tensor, params: Rows[SamplingParams]) -> LogWeights:
        """For rows whose largest scores are `best[n]`, without their filters."""
        heat = [max(p.temperature, _LEAST_TEMPERATURE) for p in params]
        return cls(best[:, None], upload(heat, torch.float32, best.device)[:, None])

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        """Log-weights of `scores[n, k]`, any columns; -inf below the floor."""
        weights = (scores - self.best).div_(self.temperature)
        return weights if self.floor is None else weights.masked_fill_(weights < self.floor, -math.inf)

    def select(self, rows: torch.Tensor) -> LogWeights:
        """The same for those rows; int64 `[m]`."""
        return LogWeights(self.best[rows], self.temperature[rows], None if self.floor is None else self.floor[rows])


def filtered(params: SamplingParams, vocab_size: int) -> bool:
    """Whether any token can be dropped."""
    return params.min_p > 0 or 0 < params.top_k < vocab_size or params.top_p < 1


def floor_on_host(scores: _Floats, peaks: _Floats, params: SamplingParams) -> float:
    """The floor of one row's log-weights, from its `scores[vocab]` and the largest of each of some blocks of them."""
    best, temperature = peaks.max(), np.float32(max(params.temperature, _LEAST_TEMPERATURE))
    floor = np.float32(math.log(params.min_p) if params.min_p else -math.inf)
    if not np.isfinite(best):
        return -math.inf
    left = scores
    if 0 < params.top_k < scores.size:
        if params.top_k < peaks.size:  # so many blocks have a token at least that high
            left = left[np.flatnonzero(left >= _largest(peaks, params.top_k))]
        floor = max(floor, (_largest(left, params.top_k) - best) / temperature)
    if params.top_p < 1:
        weights = (left - best) / temperature
        if floor > -math.inf:
            weights = weights[np.flatnonzero(weights >= floor)]
        floor = max(floor, _nucleus_floor(weights, params.top_p))
    return float(floor)


def _largest(values: _Floats, count: int) -> np.float32:
    """The last of the `count` largest."""
    place = values.size - count
    kth: np.float32 = np.partition(values, place)[place]
    return kth


def _nucleus_floor(weights: _Floats, share: float) -> np.float32:
    """The least log-weight in the smallest set of likeliest tokens that holds the share of the mass."""
    mass = np.exp(weights)
    total = float(mass.sum(dtype=np.float64))
    ahead = mass >= (1 - share) * total / mass.size
    if 2 * np.count_nonzero(ahead) < mass.size:
        weights = weights[np.flatnonzero(ahead)]
    head = np.sort(weights)
    mass = np.exp(head)
    least: np.float32 = head[min(_fitting(mass, float(mass.sum(dtype=np.float64)) - share * total), head.size - 1)]
    return least


def _fitting(mass: _Floats, spare: float) -> int:
    """How many of the first elements fit into `spare` together. Sums strides first: a running sum over all is slow."""
    whole = mass.size // _STRIDE * _STRIDE
    held = mass[:whole].reshape(-1, _STRIDE).sum(axis=1, dtype=np.float64).cumsum()
    strides = int(np.searchsorted(held, spare, side="right"))
    before = float(held[strides - 1]) if strides else 0.0
    within = mass[strides * _STRIDE : (strides + 1) * _STRIDE].cumsum(dtype=np.float64)
    return strides * _STRIDE + int(np.searchsorted(within, spare - before, side="right"))


def floors(weights: torch.Tensor, params: Rows[SamplingParams]) -> torch.Tensor:
    """The floors `[n]` of log-weights `[n, vocab]`. Never waits for the device."""
    vocab, device = weights.shape[1], weights.device
    floor = upload([math.log(p.min_p) if p.min_p else -math.inf for p in params], torch.float32, device)
    small = [row for row, p in enumerate(params) if 0 < p.top_k < vocab and p.top_k <= _SMALL_TOP_K]
    large = [row for row, p in enumerate(params) if _SMALL_TOP_K < p.top_k < vocab]
    wide = [row for row, p in enumerate(params) if p.top_p < 1 and row not in set(small)]
    for group, limited, sorts in ((small, True, False), (large, True, False), (wide, False, True)):
        if not group:
            continue
        chosen, shares, least = some(weights, group), [params[row].top_p for row in group], some(floor, group)[:, None]
        if limited:
            counts = [params[row].top_k for row in group]
            head = chosen.topk(max(counts), dim=1).values
            last = upload([count - 1 for count in counts], torch.long, device)
            least = torch.maximum(least, head.gather(1, last[:, None]))
        else:
            head = chosen.sort(dim=1, descending=True).values
        if sorts or (group is small and min(shares) < 1):
            least = torch.maximum(least, _nucleus_floors(_cut(chosen, least), _cut(head, least), shares))
        put(floor, group, least[:, 0])
    return floor


def _cut(weights: torch.Tensor, floor: torch.Tensor) -> torch.Tensor:
    return weights.masked_fill(weights < floor, -math.inf)


def _nucleus_floors(weights: torch.Tensor, head: torch.Tensor, shares: Rows[float]) -> torch.Tensor:
    """`[n, 1]`: the same as `_nucleus_floor`; `head` holds the largest of each row's weights in falling order. A row whose
    share is 1, or whose head does not hold it, gets the end of its head."""
    total = weights.exp().sum(dim=1, keepdim=True, dtype=torch.float64)
    wanted = upload([share if share < 1 else math.inf for share in shares], torch.float64, weights.device)
    held = head.exp().cumsum(dim=1, dtype=torch.float64)
    place = (held < wanted[:, None] * total).sum(dim=1, keepdim=True).clamp_(max=head.shape[1] - 1)
    return head.gather(1, place)
