"""Draws the next token of every row of a step from its logits.

Order of operations per row: penalties, `logit_bias`, `min_tokens`; then greedy takes the best, and anything else divides by
the temperature, filters by `min_p`, `top_k` and `top_p` in that order (vLLM's), and draws.

Invariants:
- A draw depends on the row's logits, its parameters, its tokens so far and `(seed, output position)` only (`gumbel`). Neither
  neighbours in the batch, nor the device's generator, nor an earlier attempt take part.
- Filters cut at a *value*, and keep every token that ties with it, so that no sorting order matters.
- A row without a usable maximum is a fault of that row only.
- On a GPU no call waits for the device but `Draws.read`. On a CPU looking at a value costs nothing, so there the work goes
  where the values say (`gumbel.race_by_blocks`, `filters.floor_on_host`); the tokens are the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Rows
from dataclasses import dataclass, replace

import numpy as np
import torch

from core.sampling import SamplingParams
from engine.plan import Drawn
from engine.sampling.filters import LogWeights, filtered, floor_on_host, floors
from engine.sampling.gumbel import peaks, race, race_by_blocks, states, stream
from engine.sampling.host import Fetch, put, some, upload
from engine.sampling.logprobs import Logprobs
from engine.sampling.penalties import Penalties

_CPU_PORTION_BYTES = 1 << 20  # stays in a core's cache
_GPU_PORTION_BYTES = 1 << 26  # several temporaries of twice this size are made


@dataclass(frozen=True)
class _Row:
    """What is known of a row until it is dropped.

    Attributes:
        stream: what its draws start from.
        ends: ids that `min_tokens` masks; None where it masks nothing.
        bias: ids of `logit_bias` and what each gets.
        plain: greedy and nothing else: the token of the largest logit.
        fault: why nothing can be drawn for the row.
    """

    params: SamplingParams
    stream: int
    ends: torch.Tensor | None = None
    bias: tuple[torch.Tensor, torch.Tensor] | None = None
    plain: bool = False
    fault: str | None = None


class Draws:
    """The tokens of one step.

    Attributes:
        tokens: int64 `[n]` on the logits' device, -1 for a row that could not be drawn from. There as soon as the stream
            gets to it; nothing waits.
    """

    def __init__(self, tokens: torch.Tensor, logprobs: Logprobs, faults: dict[int, str]) -> None:
        self.tokens = tokens
        self._logprobs = logprobs
        self._faults = faults
        self._fetch = Fetch(tokens)

    @property
    def ready(self) -> bool:
        """Whether `read` would return at once."""
        return self._fetch.ready

    def read(self) -> tuple[tuple[Drawn, ...], dict[int, str]]:
        """What was drawn for each row, in order, and why some rows have no token (theirs is -1). Waits for the device."""
        (tokens,) = self._fetch.wait()
        logprobs = self._logprobs.read()
        drawn = tuple(Drawn(token, logprobs.get(i) if token >= 0 else None) for i, token in enumerate(tokens.tolist()))
        lost = {i: self._faults.get(i, "the logits are not finite") for i, one in enumerate(drawn) if one.token < 0}
        return drawn, lost


class Sampler:
    """Samples for one model on one device. Not thread-safe; on a GPU, all calls are made on one stream.

    Rows are numbers of the caller's choosing. A row is admitted once, draws, and is dropped; one that comes back with its
    output so far is equal to one that never left.
    """

    def __init__(
        self, vocab_size: int, eos_token_ids: frozenset[int], device: torch.device | str = "cpu", *, looks: bool | None = None
    ) -> None:
        """`eos_token_ids` are what `min_tokens` masks beside a request's own stop ids. `looks`: whether draws may look at
        values on the host on their way; by default where that is free, on a CPU."""
        self._vocab_size = vocab_size
        self._eos = eos_token_ids
        self._device = torch.device(device)
        self._looks = self._device.type == "cpu" if looks is None else looks
        portion = _CPU_PORTION_BYTES if self._device.type == "cpu" else _GPU_PORTION_BYTES
        self._portion_rows = max(1, portion // (4 * vocab_size))
        self._rows: dict[int, _Row] = {}
        self._penalties = Penalties(vocab_size, self._device)

    @torch.inference_mode()
    def admit(self, row: int, tokens: Rows[int], prompt_tokens: int, params: SamplingParams) -> None:
        """From now on `row` is a generation with these tokens, the first `prompt_tokens` of them its prompt. Whatever the
        number stood for before is forgotten."""
        self.drop(row)
        self._penalties.admit(row, tokens, prompt_tokens, params)
        known = _Row(params, stream(params.seed), plain=_is_plain(params))
        if params.min_tokens:
            ends = sorted(token for token in {*self._eos, *params.stop_token_ids} if token < self._vocab_size)
            known = replace(known, ends=upload(ends, torch.long, self._device))
        if params.logit_bias:
            outside = [token for token in params.logit_bias if token >= self._vocab_size]
            if outside:
                reason = f"logit_bias names token {outside[0]}, but the vocabulary ends at {self._vocab_size - 1}"
                known = replace(known, fault=reason)
            else:
                ids = upload(list(params.logit_bias), torch.long, self._device)
                known = replace(known, bias=(ids, upload(list(params.logit_bias.values()), torch.float32, self._device)))
        self._rows[row] = known

    def drop(self, row: int) -> None:
        """Forget the row, if it is known."""
        self._rows.pop(row, None)
        self._penalties.drop(row)

    @torch.inference_mode()
    def draw(self, logits: torch.Tensor, rows: Rows[int], positions: Rows[int]) -> Draws:
        """Draw one token per row of `logits[n, vocab]`, for `rows[n]`, all different, at output `positions[n]`.

        The drawn tokens count as the rows' output from here on. `logits` stay as they are.

        Raises:
            KeyError: a row that was not admitted.
        """
        known = [self._rows[row] for row in rows]
        if self._looks and all(row.plain for row in known):
            tokens = _largest_on_host(logits)
            return Draws(tokens, Logprobs(logits, tokens, [row.params.logprobs for row in known]), {})
        tokens = torch.empty(len(rows), dtype=torch.long, device=logits.device)
        for first in range(0, len(rows), self._portion_rows):
            part = slice(first, first + self._portion_rows)
            scores = logits[part].to(torch.float32, copy=True)
            self._penalties.apply(scores, rows[part])
            self._adjust(scores, known[part], positions[part])
            tokens[part] = self._choose(scores, known[part], positions[part])
        faults = {place: row.fault for place, row in enumerate(known) if row.fault is not None}
        if faults:
            tokens.index_fill_(0, upload(list(faults), torch.long, logits.device), -1)
        self._penalties.count(rows, tokens)
        return Draws(tokens, Logprobs(logits, tokens, [row.params.logprobs for row in known]), faults)

    def _adjust(self, scores: torch.Tensor, rows: Rows[_Row], positions: Rows[int]) -> None:
        """Apply bias and `min_tokens` in place."""
        flat = scores.view(-1)
        first = [place * self._vocab_size for place in range(len(rows))]
        biases = [(row.bias[0] + start, row.bias[1]) for row, start in zip(rows, first, strict=True) if row.bias is not None]
        if biases:
            flat.index_add_(0, torch.cat([ids for ids, _ in biases]), torch.cat([values for _, values in biases]))
        masked = [
            row.ends + start
            for row, start, position in zip(rows, first, positions, strict=True)
            if row.ends is not None and position < row.params.min_tokens
        ]
        if masked:
            flat.index_fill_(0, torch.cat(masked), -math.inf)

    def _choose(self, scores: torch.Tensor, rows: Rows[_Row], positions: Rows[int]) -> torch.Tensor:
        """Tokens for adjusted `scores[n, vocab]` (fp32), -1 where the best is not finite."""
        random = [place for place, row in enumerate(rows) if not row.params.greedy]
        if len(random) == len(rows):
            tokens, best = self._race(scores, rows, positions)
            return torch.where(torch.isfinite(best), tokens, -1)
        # NumPy's search is vectorised on a CPU, torch's is not.
        tokens = torch.from_numpy(scores.numpy().argmax(axis=1)) if self._looks else scores.argmax(dim=1)
        best = scores.gather(1, tokens[:, None])[:, 0]
        if random:
            drawn, _ = self._race(some(scores, random), [rows[place] for place in random], [positions[place] for place in random])
            put(tokens, random, drawn)
        return torch.where(torch.isfinite(best), tokens, -1)

    def _race(self, scores: torch.Tensor, rows: Rows[_Row], positions: Rows[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw for rows at temperatures above 0: tokens, and the largest scores. A row whose largest score is not finite gets
        an arbitrary number."""
        params = [row.params for row in rows]
        streams = upload([row.stream for row in rows], torch.long, scores.device)
        draws = states(streams, upload(positions, torch.long, scores.device))
        cut = [place for place, p in enumerate(params) if filtered(p, self._vocab_size)]
        if self._looks:
            tops = peaks(scores)
            weigh = LogWeights.of(best := tops.amax(dim=1), params)
            if cut:
                floor = torch.full_like(best, -math.inf)
                for place in cut:
                    floor[place] = floor_on_host(scores[place].numpy(), tops[place].numpy(), params[place])
                weigh = replace(weigh, floor=floor[:, None])
            return race_by_blocks(scores, tops, draws, weigh), best
        weigh = LogWeights.of(best := scores.amax(dim=1), params)
        if cut:
            floor = torch.full_like(best, -math.inf)
            put(floor, cut, floors(some(weigh(scores), cut), [params[place] for place in cut]))
            weigh = replace(weigh, floor=floor[:, None])
        return race(scores, draws, weigh), best


def _is_plain(params: SamplingParams) -> bool:
    penalised = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
    return params.greedy and not (penalised or params.logit_bias or params.min_tokens)


def _largest_on_host(logits: torch.Tensor) -> torch.Tensor:
    """int64 `[n]`: tokens of the largest of `logits[n, vocab]`, -1 where that is not finite."""
    scores = logits.float().numpy()
    tokens = scores.argmax(axis=1)
    best = scores[np.arange(len(tokens)), tokens]
    return torch.from_numpy(np.where(np.isfinite(best), tokens, -1))
