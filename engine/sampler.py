"""Draws the next token of every sequence of a step from its logits.

Order of operations per row: penalties, `logit_bias`, `min_tokens`; then greedy takes the best, and anything else divides by
the temperature, filters by `min_p`, `top_k` and `top_p` in that order (vLLM's), and draws.

Invariants:
- A draw depends on the row's logits, its parameters and `(seed, output position)` only: the one uniform it needs comes from a
  counter-based hash on the host, and it picks along the cumulative distribution in vocabulary order, in float64. Neither
  neighbours in the batch, nor the device's generator, nor an earlier attempt take part.
- Filters cut at a *value*, and keep every token that ties with it, so that no sorting order matters.
- A row without a usable maximum is a fault of that row only.
"""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch

from core.sampling import SamplingParams
from engine.plan import Drawn
from engine.results import TokenLogprobs
from engine.sequence import Sequence

_MASK64 = (1 << 64) - 1
_STEP64 = 0x9E3779B97F4A7C15
_CPU_PORTION_BYTES = 1 << 20
_BIN_SHIFT = 48


@dataclass(frozen=True)
class Sampled:
    """`drawn[i]` belongs to row `i`; `faults` maps rows that could not be drawn from to why (their token is -1)."""

    drawn: tuple[Drawn, ...]
    faults: dict[int, str]


class Sampler:
    """Samples for one model. `eos_token_ids` are what `min_tokens` masks beside a request's own stop ids."""

    def __init__(self, vocab_size: int, eos_token_ids: frozenset[int]) -> None:
        self._vocab_size = vocab_size
        self._eos = eos_token_ids

    def sample(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> Sampled:
        """Draw one token per row of `logits[n, vocab]` for `sequences[n]`."""
        if not sequences:
            return Sampled((), {})
        best, tokens = logits.max(dim=-1)
        usable = torch.isfinite(best)
        special = [row for row, sequence in enumerate(sequences) if not self._is_plain(sequence)]
        faults: dict[int, str] = {}
        for rows in self._portions(special, logits.device):
            tokens[rows], usable[rows], found = self._draw_special(logits[rows], [sequences[row] for row in rows])
            faults.update({rows[place]: reason for place, reason in found.items()})
        chosen = torch.where(usable, tokens, -1).tolist()
        for row, token in enumerate(chosen):
            if token < 0:
                faults.setdefault(row, "the logits are not finite")
            elif row in faults:
                chosen[row] = -1
        logprobs = self._logprobs(logits, chosen, sequences)
        drawn = tuple(Drawn(token, logprobs.get(row)) for row, token in enumerate(chosen))
        return Sampled(drawn, faults)

    def _portions(self, rows: list[int], device: torch.device) -> list[list[int]]:
        """All rows at once on a GPU; on a CPU as many as stay in its cache, since fresh memory costs more than the sums."""
        size = len(rows) if device.type != "cpu" else max(1, _CPU_PORTION_BYTES // (8 * self._vocab_size))
        return [rows[first : first + size] for first in range(0, len(rows), max(1, size))]

    def _is_plain(self, sequence: Sequence) -> bool:
        """Greedy with nothing to adjust: the largest raw logit is the answer."""
        return sequence.sampling.greedy and not self._is_adjusted(sequence)

    def _is_adjusted(self, sequence: Sequence) -> bool:
        s = sequence.sampling
        return bool(
            s.repetition_penalty != 1.0
            or s.presence_penalty
            or s.frequency_penalty
            or s.logit_bias
            or sequence.output_tokens < s.min_tokens
        )

    def _draw_special(self, logits: torch.Tensor, sequences: Rows[Sequence]) -> tuple[torch.Tensor, torch.Tensor, dict[int, str]]:
        """Tokens, whether each is usable, and reasons for those that are known not to be."""
        scores = logits.float()  # `logits` was indexed by a list, so this never writes to the caller's
        faults: dict[int, str] = {}
        for row, sequence in enumerate(sequences):
            if self._is_adjusted(sequence):
                reason = self._adjust(scores[row], sequence)
                if reason is not None:
                    faults[row] = reason
        best, tokens = scores.max(dim=-1)
        random = [row for row, sequence in enumerate(sequences) if not sequence.sampling.greedy]
        if random:
            tokens[random] = draw(
                _some(scores, random),
                [sequences[row].sampling for row in random],
                [uniform(sequences[row].sampling.seed, sequences[row].output_tokens) for row in random],
            )
        return tokens, torch.isfinite(best), faults

    def _adjust(self, scores: torch.Tensor, sequence: Sequence) -> str | None:
        """Apply penalties, bias and `min_tokens` to one row in place; say why if that cannot be done."""
        s = sequence.sampling
        if s.repetition_penalty != 1.0:
            seen = torch.unique(self._ids(sequence.tokens, scores.device))
            values = scores[seen]
            scores[seen] = torch.where(values > 0, values / s.repetition_penalty, values * s.repetition_penalty)
        if (s.presence_penalty or s.frequency_penalty) and sequence.output_tokens:
            output = self._ids(sequence.tokens[sequence.prompt_tokens :], scores.device)
            found, times = torch.unique(output, return_counts=True)
            scores[found] -= s.frequency_penalty * times + s.presence_penalty
        if s.logit_bias:
            outside = [token for token in s.logit_bias if token >= self._vocab_size]
            if outside:
                return f"logit_bias names token {outside[0]}, but the vocabulary ends at {self._vocab_size - 1}"
            places = torch.tensor(list(s.logit_bias), device=scores.device)
            scores[places] += torch.tensor(list(s.logit_bias.values()), dtype=scores.dtype, device=scores.device)
        if sequence.output_tokens < s.min_tokens:
            ends = [token for token in {*self._eos, *s.stop_token_ids} if token < self._vocab_size]
            scores[torch.tensor(ends, dtype=torch.long, device=scores.device)] = float("-inf")
        return None

    def _ids(self, tokens: list[int], device: torch.device) -> torch.Tensor:
        return torch.tensor(tokens, dtype=torch.long, device=device)

    def _logprobs(self, logits: torch.Tensor, chosen: list[int], sequences: Rows[Sequence]) -> dict[int, TokenLogprobs]:
        """Log-probabilities of the model's own distribution, for the rows that ask and have a token."""
        wanted = {row: s.sampling.logprobs for row, s in enumerate(sequences) if s.sampling.logprobs is not None}
        rows = [row for row in wanted if chosen[row] >= 0]
        if not rows:
            return {}
        table = torch.log_softmax(logits[rows].float(), dim=-1)
        own = table[torch.arange(len(rows)), torch.tensor([chosen[row] for row in rows], device=table.device)].tolist()
        most = min(self._vocab_size, max(wanted[row] or 0 for row in rows))
        values, ids = (part.tolist() for part in table.topk(most, dim=-1))
        return {
            row: TokenLogprobs(own[i], tuple(zip(ids[i][: wanted[row]], values[i][: wanted[row]], strict=True)))
            for i, row in enumerate(rows)
        }


def draw(scores: torch.Tensor, params: Rows[SamplingParams], uniforms: Rows[float]) -> torch.Tensor:
    """One token per row of `scores[n, vocab]` at temperatures above 0: the inverse of the filtered distribution at `uniforms`.

    Rows without a finite maximum give an arbitrary token.
    """
    temperature = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=scores.device)
    weights = scores.double()
    weights -= weights.amax(dim=-1, keepdim=True)
    weights.div_(temperature[:, None]).exp_()
    _filter(weights, params)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1:]
    target = torch.tensor(uniforms, dtype=torch.float64, device=scores.device)[:, None] * total
    tokens = torch.searchsorted(cumulative, target, right=True)
    last = (cumulative < total).sum(dim=-1, keepdim=True)  # where rounding carried the target up to the total
    return torch.minimum(tokens, last)[:, 0].clamp_(max=scores.shape[-1] - 1)


def _filter(weights: torch.Tensor, params: Rows[SamplingParams]) -> None:
    """Zero, in place, what `min_p`, `top_k` and `top_p` drop. `weights` are relative to the likeliest token's 1."""
    vocab = weights.shape[-1]
    if any(p.min_p for p in params):
        floor = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=weights.device)
        weights.masked_fill_(weights < floor[:, None], 0)
    limited = [row for row, p in enumerate(params) if 0 < p.top_k < vocab]
    if limited:
        counts = torch.tensor([params[row].top_k for row in limited], device=weights.device)
        largest = _some(weights, limited).topk(int(max(params[row].top_k for row in limited)), dim=-1).values
        _cut(weights, limited, largest.gather(1, counts[:, None] - 1))
    nucleus = [row for row, p in enumerate(params) if p.top_p < 1.0]
    if nucleus:
        shares = torch.tensor([params[row].top_p for row in nucleus], dtype=torch.float64, device=weights.device)
        _cut(weights, nucleus, _nucleus_floor(_some(weights, nucleus), shares))


def _some(weights: torch.Tensor, rows: list[int]) -> torch.Tensor:
    """Those rows; no copy where that is all of them."""
    return weights if len(rows) == len(weights) else weights[rows]


def _cut(weights: torch.Tensor, rows: list[int], floor: torch.Tensor) -> None:
    chosen = _some(weights, rows)
    chosen.masked_fill_(chosen < floor, 0)
    if chosen is not weights:
        weights[rows] = chosen


def _nucleus_floor(weights: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    """`[n, 1]`: the smallest weight in each row's smallest set of likeliest tokens that holds the share of its mass."""
    if weights.device.type == "cpu":
        return torch.stack([_nucleus_floor_of(row, share) for row, share in zip(weights, shares.tolist(), strict=True)])[:, None]
    ordered = weights.sort(dim=-1).values
    return ordered.gather(1, _dropped(ordered, (1 - shares[:, None]) * weights.sum(dim=-1, keepdim=True)))


def _nucleus_floor_of(weights: torch.Tensor, share: float) -> torch.Tensor:
    """The same for one row without sorting it: find the histogram bin that the floor falls into, and sort that.

    A bin holds the weights that share their leading bits (exponent and four bits of fraction), so bins are in order of weight.
    """
    total = weights.sum()
    if not torch.isfinite(total):
        return weights.new_zeros(())
    bins = weights.view(torch.int64) >> _BIN_SHIFT
    below = torch.bincount(bins, weights=weights).cumsum(0)
    spare = (1 - share) * total
    place = torch.searchsorted(below, spare, right=True).clamp_(max=int(bins.max()))
    inside = weights[bins == place].sort().values
    if place > 0:
        spare = spare - below[place - 1]
    return inside[_dropped(inside[None], spare.view(1, 1))[0, 0]]


def _dropped(ordered: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """How many of each row's rising weights fit into the mass to spare; the last one always stays."""
    return (ordered.cumsum(dim=-1) <= spare).sum(dim=-1, keepdim=True).clamp_(max=ordered.shape[-1] - 1)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) for one output position of one seed: SplitMix64 (Steele, Lea and Flood, 2014), counter-based."""
    key = _mixed(seed + _STEP64)
    return float(_mixed(key + (position + 1) * _STEP64) >> 11) * 2.0**-53


def _mixed(value: int) -> int:
    value &= _MASK64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK64
    return value ^ (value >> 31)
