"""What answers look like, for the published schema. Routes write their JSON themselves; a test holds every one of them to this.

Fields without a default are always there; the others are there when something asked for them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class _Shape(BaseModel):
    """Clients must expect more fields than are listed: later versions add some."""


class Error(_Shape):
    """`code` is stable and for programs, `message` is for people, `param` is the path of the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(_Shape):
    """Every error, of every route; in a stream that has begun, an event."""

    error: Error


# --- generating


class PromptTokensDetails(_Shape):
    cached_tokens: int


class Usage(_Shape):
    """A prompt counts once, whatever `n`. `prompt_tokens_details` is not in usage that runs along with a stream."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class Trace(_Shape):
    """Where a generation was served: the answer to `x-hetserve-trace: 1`, and what `/debug/requests` lists. Seconds."""

    id: str
    outcome: Literal["running", "completed", "failed", "cancelled"]
    finish_reason: Literal["stop", "length"] | None
    error: str | None
    prefill: str | None
    decode: str | None
    local: bool
    attempts: int
    why: str | None
    prompt_tokens: int
    tokens: int
    cached_tokens: int
    kv_bytes: int
    transfer_s: float
    queue_s: float
    ttft_s: float | None
    tpot_s: float | None
    total_s: float | None
    predicted_ttft_s: float | None
    predicted_tpot_s: float | None


class _Answer(_Shape):
    id: str
    created: int
    model: str
    hetserve: Trace | list[Trace] | None = None


class _Chunk(_Answer):
    """`usage` is in every chunk of a stream that asked for it: null until the last, unless it runs along."""

    usage: Usage | None = None


class _Choice(_Shape):
    """`stop_reason` is the stop string, or the id of the stop token, that ended it."""

    index: int
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None = None
    token_ids: list[int] | None = None


class TokenLogprob(_Shape):
    """`bytes` is null where the tokenizer does not say which a token stands for."""

    token: str
    logprob: float
    bytes: list[int] | None


class DrawnLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(_Shape):
    """Token strings, put together, are the text. Those of one character's tokens are empty up to its last."""

    content: list[DrawnLogprob]
    refusal: None


class CompletionLogprobs(_Shape):
    """The same; `text_offset` counts characters of the generated text."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class AnswerMessage(_Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Choice):
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class ChatAnswer(_Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | None = None


class DeltaMessage(_Shape):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(_Choice):
    delta: DeltaMessage
    logprobs: ChatLogprobs | None


class ChatChunk(_Chunk):
    """One event of a stream, which ends in `data: [DONE]`. The last chunk before that, with usage, has no choices."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | None = None


class CompletionChoice(_Choice):
    text: str
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] | None = None


class CompletionAnswer(_Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionChunk(_Chunk):
    """One event of a stream, which ends in `data: [DONE]`. The last chunk before that, with usage, has no choices."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]


# --- tokenizing


class TokenizeAnswer(_Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(_Shape):
    prompt: str


# --- status


class ModelCard(_Shape):
    """`root` is what was loaded, the same for all names of it. `max_model_len` is null before an instance lives."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int | None


class ModelList(_Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Health(_Shape):
    """`instances` counts those alive by role."""

    status: Literal["ok", "unavailable"]
    reasons: list[str]
    instances: dict[str, int]


class Live(_Shape):
    status: Literal["ok"]


class ServerLoad(_Shape):
    """Generations under way, those that wait among them."""

    server_load: int


class Version(_Shape):
    version: str


class InstanceRow(_Shape):
    """An instance as its last heartbeat told it."""

    name: str
    role: Literal["prefill", "decode", "mixed"]
    accelerator: str
    node: str
    incarnation: int
    state: Literal["ready", "draining", "stuck"]
    last_seen_s: float
    running: int
    waiting: int
    waiting_tokens: int
    context_tokens: int
    free_blocks: int
    held_blocks: int
    total_blocks: int
    block_size: int
    dtype: str
    max_model_len: int
    max_num_seqs: int
    steps: int
    model: str
    kind: int
    mailbox: str
    kv_endpoint: str


class InstanceList(_Shape):
    instances: list[InstanceRow]


class RequestList(_Shape):
    """`recent` are those that ended, newest first."""

    recent: list[Trace]
    running: list[Trace]


class Invariants(_Shape):
    """Counts that are back at rest once nothing runs."""

    accepted: int
    completed: int
    failed: int
    cancelled: int
    in_flight: int
