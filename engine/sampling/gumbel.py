"""Gumbel noise keyed by (seed, output position, token), and the races that it decides.

The token with the largest `x[t] + G[t]`, with independent standard Gumbel `G`, is a draw from `softmax(x)` (Gumbel-max).
`G[t] = -log E[t]`, where `E[t]` is exponential and a function of the three keys alone: no state, no order, no neighbours, and
a token's noise is the same whatever other tokens have theirs computed.

A draw's noise is made from the top down (as in A* sampling: Maddison, Tarlow and Minka, 2014). Tokens lie in blocks of 64. The
least of 64 exponentials is an exponential over 64, at a lane that is uniform and independent of it; the others lie behind it
by exponentials of their own, for an exponential has no memory. So all `E[t]` are independent and exponential, exactly, and the
best that a block can reach is known from one number of noise and its largest logit: a CPU computes the noise of the few
blocks that can still win (`race_by_blocks`). A GPU, where looking would mean waiting, computes all (`race`); both name the
same token.

The bits are SplitMix64's (Steele, Lea and Flood, 2014): output `i` of state `s` is `mix(s + i * golden)`, so it is
counter-based, in eleven integer operations that are the same on every device (Philox4x32-10 is a hundred). A seed's stream
gives one state for each output position; in that state's stream token `t` has output `t + 1` and block `b` output `-1 - b`.

A uniform has 53 bits, of which fp32 keeps the leading 24 wherever they lie: it is at least 2^-54 and at most 1 - 2^-24. Small
`E`, which win, come from small uniforms, so they keep full relative precision down to 2^-60: a token's noise reaches 41.6 nats
up, and the grid on which a token of probability 1e-15 is drawn has some 600 steps below it. Only the end that loses is coarse: it
steps by 2^-24 in probability, and `E` stops at 16.6.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from engine.sampling.filters import LogWeights

BLOCK = 64
_FIRST_BLOCKS = 16
_SLACK = 1e-4  # nats; logarithms of neighbouring floats may come out in the wrong order, by less than 1e-5
_NO_TOKEN = torch.iinfo(torch.int64).max
_LAST_UNIFORM = 1.0 - 2.0**-24


def _signed(word: int) -> int:
    """A 64-bit word as int64 has it."""
    return word - (1 << 64) if word >> 63 else word


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def bits(states: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """64 random bits (int64) for each: SplitMix64's output of that number, 0 being the state's own, from that state. Both
    int64, broadcast against each other."""
    word = states + outputs * _GOLDEN
    word ^= _shifted(word, 30)
    word *= _MIX_1
    word ^= _shifted(word, 27)
    word *= _MIX_2
    word ^= _shifted(word, 31)
    return word


def _shifted(word: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros coming in; int64's own shift brings in the sign."""
    moved = word >> by
    moved &= (1 << (64 - by)) - 1
    return moved


def stream(seed: int) -> int:
    """What the states of a seed's draws are made from."""
    return int(bits(torch.tensor([seed]), torch.ones(1, dtype=torch.long)))


def states(streams: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """int64 `[n]`: what the noise of each draw starts from. Both arguments int64 `[n]`."""
    return bits(streams, positions + 1)


def noise(draws: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """fp32 `[n, vocab]`: every token's Gumbel noise in draws of those `states` `[n]`."""
    blocks = torch.arange(-(-vocab_size // BLOCK), device=draws.device)
    return _noise(draws, blocks, *_least(draws, blocks)).flatten(1)[:, :vocab_size]


def race(scores: torch.Tensor, draws: torch.Tensor, weigh: LogWeights) -> torch.Tensor:
    """int64 `[n]`: the winners over `scores[n, vocab]`, the lowest id where two tie. Never waits for the device.

    Rows without a finite maximum get an arbitrary number.
    """
    vocab = scores.shape[1]
    return _winners(weigh(scores).add_(noise(draws, vocab)), torch.arange(vocab, device=scores.device))[0]


def peaks(scores: torch.Tensor) -> torch.Tensor:
    """`[n, blocks]`: the largest of each block of `scores[n, vocab]`; the last block may be short."""
    whole = scores.shape[1] // BLOCK * BLOCK
    best = scores[:, :whole].view(len(scores), -1, BLOCK).amax(dim=-1) if whole else scores[:, :0]
    return best if whole == scores.shape[1] else torch.cat([best, scores[:, whole:].amax(dim=1, keepdim=True)], dim=1)


def race_by_blocks(scores: torch.Tensor, tops: torch.Tensor, draws: torch.Tensor, weigh: LogWeights) -> torch.Tensor:
    """The same winners, from the noise of those blocks alone that can hold them; `tops` are the `peaks` of the scores. Looks
    at values on the host."""
    least, lanes = _least(draws, torch.arange(tops.shape[1], device=scores.device))
    heat = _Heat(scores, draws, weigh, least, lanes, weigh(tops).sub_(least.log()))
    width = min(_FIRST_BLOCKS, tops.shape[1])
    winners, reached = heat.run(width)
    undecided = torch.arange(len(scores))
    while True:
        needed = (heat.bounds >= reached[:, None] - _SLACK).sum(dim=1)
        left = (needed > width).nonzero()[:, 0]
        if not len(left):
            return winners
        undecided, heat, width = undecided[left], heat.select(left), min(4 * width, int(needed.max()))
        winners[undecided], reached = heat.run(width)


@dataclass(frozen=True)
class _Heat:
    """A race among each row's most promising blocks. `least`, `lanes` and `bounds` are `[n, blocks]`."""

    scores: torch.Tensor
    draws: torch.Tensor
    weigh: LogWeights
    least: torch.Tensor
    lanes: torch.Tensor
    bounds: torch.Tensor

    def select(self, rows: torch.Tensor) -> _Heat:
        """The same for those rows."""
        return _Heat(
            self.scores[rows], self.draws[rows], self.weigh.select(rows), self.least[rows], self.lanes[rows], self.bounds[rows]
        )

    def run(self, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Winners over the `width` blocks of the highest bounds, and what they reach: both `[n]`."""
        vocab = self.scores.shape[1]
        blocks = self.bounds.topk(width, dim=1, sorted=False).indices
        tokens = _tokens(blocks).flatten(1)
        short = vocab % BLOCK != 0
        reached = self.weigh(self.scores.gather(1, tokens.clamp(max=vocab - 1) if short else tokens))
        reached += _noise(self.draws, blocks, self.least.gather(1, blocks), self.lanes.gather(1, blocks)).flatten(1)
        return _winners(reached.masked_fill_(tokens >= vocab, -math.inf) if short else reached, tokens)


def _tokens(blocks: torch.Tensor) -> torch.Tensor:
    """`[..., k, 64]`: the ids in `blocks[..., k]`."""
    return blocks[..., None] * BLOCK + torch.arange(BLOCK, device=blocks.device)


def _least(draws: torch.Tensor, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The least exponential of each of `blocks[k]`, and the lane that has it: fp32 and int64, `[n, k]`."""
    word = bits(draws[:, None], ~blocks)
    return _exponential(word).mul_(1 / BLOCK), word & (BLOCK - 1)


def _noise(draws: torch.Tensor, blocks: torch.Tensor, least: torch.Tensor, lanes: torch.Tensor) -> torch.Tensor:
    """fp32 `[n, k, 64]`: Gumbel noise of the tokens of `blocks` (`[n, k]` or `[k]`), which have `least` at `lanes`."""
    behind = _exponential(bits(draws[:, None, None], _tokens(blocks) + 1))
    behind.masked_fill_(lanes[..., None] == torch.arange(BLOCK, device=blocks.device), 0)
    return behind.add_(least[..., None]).log_().neg_()


def _exponential(word: torch.Tensor) -> torch.Tensor:
    """fp32, from the upper 53 of 64 random bits; the lowest 11 take no part."""
    uniform = _shifted(word, 11).float().add_(0.5).mul_(2.0**-53).clamp_(max=_LAST_UNIFORM)
    return uniform.neg_().log1p_().neg_()


def _winners(reached: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    best = reached.amax(dim=1)
    return torch.where(reached == best[:, None], tokens, _NO_TOKEN).amin(dim=1), best
