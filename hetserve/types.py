"""What the client returns: frozen dataclasses, in the words of OpenAI's API, seconds and bytes in the names.

`hetserve.parsing` makes them out of JSON. `raw`, where a type has it, is the JSON object as it came, for fields that have
no attribute here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Required, TypedDict

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]]


class Message(TypedDict, total=False):
    """One turn of a chat. `role` is `system`, `user` or `assistant`."""

    role: Required[str]
    content: Required[str | list[dict[str, Any]]]
    name: str


class SamplingOptions(TypedDict, total=False):
    """What `completions` and `chat` both accept, with OpenAI's and vLLM's names and meanings. `extra` goes into the body as
    it is and wins over the rest."""

    max_tokens: int
    min_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    logit_bias: Mapping[int, float]
    seed: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    ignore_eos: bool
    return_token_ids: bool
    user: str
    extra: Mapping[str, Any]


class CompletionOptions(SamplingOptions, total=False):
    """`logprobs` is how many alternatives to report per token."""

    logprobs: int
    echo: bool


class ChatOptions(SamplingOptions, total=False):
    """`top_logprobs` needs `logprobs=True`."""

    logprobs: bool
    top_logprobs: int
    max_completion_tokens: int


@dataclass(frozen=True)
class Usage:
    """Tokens as the server counted them. `cached_tokens` of the prompt came out of a prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    cached_tokens: int = 0


@dataclass(frozen=True)
class TopLogprob:
    token: str
    logprob: float
    bytes: bytes | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """The drawn token's log-probability, and the likeliest alternatives, best first. `text_offset` in characters, where
    the endpoint reports it. `logprob` is None for a token that was not predicted (the first of an echoed prompt)."""

    token: str
    logprob: float | None
    top: tuple[TopLogprob, ...] = ()
    bytes: bytes | None = None
    text_offset: int | None = None


@dataclass(frozen=True)
class Trace:
    """How the server served one generation: asked for with `trace=True`, or read from its journal. HetServe alone.

    `prefill` and `decode` name instances, the same one where `local`: the prompt was then read where the answer was written.
    `kv_bytes` is what moved between them. `outcome` is `completed`, `failed`, `cancelled` or `running`.
    """

    id: str
    prefill: str | None
    decode: str | None
    local: bool
    outcome: str
    attempts: int
    prompt_tokens: int
    tokens: int
    cached_tokens: int
    kv_bytes: int
    ttft_s: float | None
    tpot_s: float | None
    error: str | None = None
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def disaggregated(self) -> bool:
        """Whether one instance read the prompt and another, given its KV, wrote the answer."""
        return not self.local and self.prefill != self.decode and self.kv_bytes > 0


@dataclass(frozen=True)
class Choice:
    """One generation. `finish_reason` is `stop` or `length`, and None in all but the last chunk of a stream.
    `token_ids` are there when `return_token_ids` was asked for."""

    index: int
    text: str
    finish_reason: str | None = None
    role: str | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    token_ids: tuple[int, ...] | None = None
    prompt_token_ids: tuple[int, ...] | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer, of either endpoint. `traces`, where asked for, holds the trace of every choice, by its index."""

    id: str
    model: str
    created: int
    choices: tuple[Choice, ...]
    usage: Usage | None = None
    traces: tuple[Trace, ...] = ()
    request_id: str | None = None

    @property
    def text(self) -> str:
        """The first choice's text."""
        return self.choices[0].text if self.choices else ""

    @property
    def trace(self) -> Trace | None:
        """The first choice's trace."""
        return self.traces[0] if self.traces else None


@dataclass(frozen=True)
class Chunk:
    """A piece of a streamed answer. `text` is what the first of its choices adds; the last chunk carries the usage and,
    where asked for, the trace of every choice, by its index, and may have no choices."""

    id: str
    model: str
    created: int
    choices: tuple[Choice, ...]
    usage: Usage | None = None
    traces: tuple[Trace, ...] = ()

    @property
    def text(self) -> str:
        return self.choices[0].text if self.choices else ""

    @property
    def trace(self) -> Trace | None:
        return self.traces[0] if self.traces else None


@dataclass(frozen=True)
class Model:
    id: str
    created: int = 0
    owned_by: str = ""
    max_model_len: int | None = None


@dataclass(frozen=True)
class Tokenization:
    tokens: tuple[int, ...]
    count: int
    max_model_len: int | None = None


@dataclass(frozen=True)
class Health:
    """`ok` is whether the server can serve a request now; `reasons` say why not."""

    ok: bool
    status: Literal["ok", "unavailable"]
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Instance:
    """One engine of the cluster, as the gateway last heard of it, `last_seen_s` seconds ago.

    `state` is `ready`, `draining` or `stuck`. `steps` grows with every step of the engine.
    """

    name: str
    role: str
    accelerator: str
    node: str
    incarnation: int
    state: str
    last_seen_s: float
    running: int
    waiting: int
    waiting_tokens: int
    context_tokens: int
    free_blocks: int
    held_blocks: int
    total_blocks: int
    steps: int
    raw: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def kv_used(self) -> float:
        """The share of the KV cache that is in use."""
        return 1 - self.free_blocks / self.total_blocks if self.total_blocks else 0.0
