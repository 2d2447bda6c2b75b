"""How a request wants its tokens drawn.

Draws are keyed by `(seed, position)` and by nothing else, so that a replay on another worker, alone or in a crowd,
draws the same tokens. Stop *strings* are the gateway's business (it has the text); stop *token ids* are the engine's.
"""

from __future__ import annotations

import math

import msgspec

from core.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """Parameters of one generation, with OpenAI's and vLLM's names and meanings.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 are off. `logprobs` is how many of the most likely alternatives to
    report beside the drawn token; None reports nothing. Log-probabilities are those of the model's own distribution, before
    penalties, temperature and filters. Penalties follow OpenAI (`presence`, `frequency`: over generated tokens) and
    CTRL (`repetition`: over prompt and generated tokens).

    Raises:
        InvalidRequest: naming the field, on any value out of range.
    """

    max_tokens: int = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        _between("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _between("min_tokens", self.min_tokens, 0, self.max_tokens)
        _between("temperature", self.temperature, 0.0, 100.0)
        _between("top_k", self.top_k, 0, 2**31 - 1)
        _between("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _between("min_p", self.min_p, 0.0, 1.0)
        _between("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _between("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _between("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _between("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _between("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        _between("stop_token_ids (count)", len(self.stop_token_ids), 0, MAX_STOP_TOKEN_IDS)
        _between("logit_bias (count)", len(self.logit_bias), 0, MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias.items():
            _between("logit_bias", token, 0, 2**31 - 1)
            _between("logit_bias", bias, -100.0, 100.0)
        for token in self.stop_token_ids:
            _between("stop_token_ids", token, 0, 2**31 - 1)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def _between(name: str, value: float, low: float, high: float, low_open: bool = False) -> None:
    param = name.partition(" ")[0]
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidRequest(f"Got {name} = {value} but expected a finite number", param)
    if value < low or value > high or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise InvalidRequest(f"Got {name} = {value} but expected a value in {bracket}{low}, {high}]", param)
