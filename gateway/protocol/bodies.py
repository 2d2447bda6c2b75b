"""What clients may send: OpenAI's completions and chat completions, with vLLM's extras. Shapes only, no behaviour.

A field is either served, known to change nothing here (taken in silence), known and not served (refused by name unless its value
asks for nothing), or unknown (taken, and named in the answer's `x-hetserve-ignored`). `gateway.protocol.fields` says why.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from core.errors import InvalidRequest
from core.sampling import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS
from gateway.protocol.fields import Body, Count, Ids, Int, Prompt, Unserved, UnservedSettings, Whole

MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_MESSAGES = 4096


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: bool | None = None


class TextFormat(Body):
    type: Literal["text"]


class _Ignored(Body):
    """Accepted because they change nothing that this server does."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    priority: Int | None = None
    request_id: str | None = None
    spaces_between_special_tokens: bool | None = None
    length_penalty: float | None = None
    """For beam search alone."""
    truncation_side: str | None = None
    """What `truncate_prompt_tokens` would cut."""


class _Unserved(Body):
    """What would change an answer and is not served here: of OpenAI, vLLM and SGLang."""

    best_of: Annotated[Literal[None, 1], Whole] = None
    use_beam_search: Unserved = None
    prompt_logprobs: Unserved = None
    truncate_prompt_tokens: Unserved = None
    guided_json: Unserved = None
    guided_regex: Unserved = None
    guided_choice: Unserved = None
    guided_grammar: Unserved = None
    structured_outputs: Unserved = None
    structural_tag: Unserved = None
    json_schema: Unserved = None
    regex: Unserved = None
    ebnf: Unserved = None
    allowed_token_ids: Unserved = None
    bad_words: Unserved = None
    logits_processors: Unserved = None
    custom_logit_processor: Unserved = None
    custom_params: UnservedSettings = None
    logprob_token_ids: Unserved = None
    return_tokens_as_token_ids: Unserved = None
    repetition_detection: UnservedSettings = None
    include_reasoning: Literal[None, True] = None
    thinking_token_budget: Unserved = None
    watermarking: Unserved = None
    stop_regex: Unserved = None
    no_stop_trim: Unserved = None
    lora_path: Unserved = None
    session_params: UnservedSettings = None
    cache_salt: Unserved = None
    prompt_embeds: Unserved = None
    kv_transfer_params: UnservedSettings = None
    vllm_xargs: UnservedSettings = None


class GenerationRequest(_Ignored, _Unserved):
    """What both endpoints share."""

    model: str | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Count | None = None
    min_tokens: Annotated[int, Field(ge=0), Whole] | None = None
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: Annotated[int, Field(ge=-1), Whole] | None = None
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Whole] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = Field(default=None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    response_format: TextFormat | None = None

    @field_validator("stop")
    @classmethod
    def _few_short_stops(cls, value: str | list[str] | None) -> str | list[str] | None:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > MAX_STOPS:
            raise ValueError(f"at most {MAX_STOPS} stop strings")
        if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
            raise ValueError(f"stop strings must have 1 to {MAX_STOP_CHARS} characters")
        return value

    @model_validator(mode="after")
    def _options_need_stream(self) -> GenerationRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options is only allowed when stream is true")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    def parts(self) -> Iterable[tuple[str, Body]]:
        if self.stream_options is not None:
            yield "stream_options", self.stream_options
        if self.response_format is not None:
            yield "response_format", self.response_format

    @property
    def wants_running_usage(self) -> bool:
        """In every chunk; as in vLLM only together with `include_usage`."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole] | None = None
    add_special_tokens: bool | None = None
    suffix: Literal[None, ""] = None

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs is not supported")
        return self


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    """One turn. Content is text; parts of other types, and tool calls, are refused. Which roles there are the template says."""

    role: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    """vLLM's newer word for `reasoning_content`."""
    reasoning_content: str | None = None
    refusal: Unserved = None
    audio: Unserved = None
    annotations: Unserved = None
    function_call: Unserved = None
    tool_calls: Unserved = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it: parts on lines of their own, as in vLLM. `developer` is OpenAI's newer word for `system`."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content or ())
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": content}
        reasoning = self.reasoning_content if self.reasoning is None else self.reasoning
        more = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning": reasoning, "reasoning_content": reasoning}
        return turn | {key: value for key, value in more.items() if value is not None}

    def parts(self) -> Iterable[tuple[str, Body]]:
        if isinstance(self.content, list):
            yield from (("content", part) for part in self.content)


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS), Whole] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(default=None, max_length=64)
    # known and not served
    verbosity: Literal[None, "medium"] = None
    chat_template: Unserved = None
    tools: Unserved = None
    tool_choice: Literal[None, "none", "auto"] = None
    functions: Unserved = None
    function_call: Literal[None, "none", "auto"] = None
    documents: Unserved = None
    modalities: list[Literal["text"]] | None = None
    audio: Unserved = None
    web_search_options: Unserved = None
    echo: Unserved = None

    @property
    def template_options(self) -> dict[str, Any]:
        """Variables for the chat template. How much to reason is the template's to say; `chat_template_kwargs` win."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self

    def parts(self) -> Iterable[tuple[str, Body]]:
        yield from super().parts()
        yield from (("messages", message) for message in self.messages)


class TokenizeRequest(Body):
    """POST /tokenize, with vLLM's shape: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None
    # known and not served
    chat_template: Unserved = None
    tools: Unserved = None
    mm_processor_kwargs: UnservedSettings = None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self

    def parts(self) -> Iterable[tuple[str, Body]]:
        yield from (("messages", message) for message in self.messages or ())


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: Ids


B = TypeVar("B", bound=BaseModel)


def parse(kind: type[B], body: bytes) -> B:
    """Check a request's JSON.

    Raises:
        InvalidRequest: naming the first field at fault.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise InvalidRequest(f"the body is not valid JSON: {first['msg'].removeprefix('Invalid JSON: ')}") from error
        param = _path(first["loc"])
        if not param and first["type"] == "model_type":
            raise InvalidRequest("the body must be a JSON object") from error
        raise InvalidRequest(_say(first["type"], first["msg"], param), param or None) from error


def _say(kind: str, message: str, param: str) -> str:
    if kind == "missing":
        return f"{param}: required"
    if kind in ("none_required", "literal_error"):
        return f"{param}: this value is not supported ({message})"
    text = message.removeprefix("Value error, ")
    return f"{param}: {text}" if param else text


def _path(location: tuple[int | str, ...]) -> str:
    """`messages[0].content`: pydantic also names the member of a union that it tried, which is left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.isidentifier() and part not in ("str", "int", "float", "bool", "none", "nullable"):
            path += f".{part}" if path else part
    return path
