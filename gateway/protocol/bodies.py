"""What clients may send: OpenAI's completions and chat completions, with vLLM's extras. Shapes only, no behaviour.

A field is either supported, known to change nothing here (accepted and ignored), known but unsupported (refused by name
unless it has its harmless value), or unknown (refused by name). Nothing is ignored in silence that could change a result.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, PlainValidator, ValidationError, field_validator, model_validator

from core.errors import InvalidRequest
from core.sampling import MAX_LOGPROBS, MAX_STOP_TOKEN_IDS

MAX_PROMPTS = 1024
MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_MESSAGES = 4096

Ids = Annotated[list[int], FailFast()]
PromptValue = str | list[int] | list[str] | list[list[int]]


def _prompt(value: object) -> object:
    """One shape is chosen by the first element, so that a wrong list costs one error and not one per element."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        kind = type(value[0])
        if kind in (int, str) and all(type(item) is kind for item in value):
            return value
        if kind is list and all(type(item) is list and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("expected a string, a list of token ids, or a list of either, not empty")


Prompt = Annotated[PromptValue, PlainValidator(_prompt, json_schema_input_type=PromptValue)]
Off = Literal[None, False]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, frozen=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    continuous_usage_stats: Off = None


class _Ignored(_Body):
    """Accepted because they change nothing that this server does."""

    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    parallel_tool_calls: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    priority: int | None = None
    request_id: str | None = None
    spaces_between_special_tokens: bool | None = None


class GenerationRequest(_Ignored):
    """What both endpoints share."""

    model: str | None = None
    n: int | None = Field(default=None, ge=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = Field(default=None, max_length=MAX_STOP_TOKEN_IDS)
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    return_token_ids: bool | None = None
    # known, and refused unless off
    best_of: Literal[None, 1] = None
    use_beam_search: Off = None
    prompt_logprobs: None = None
    truncate_prompt_tokens: None = None
    guided_json: None = None
    guided_regex: None = None
    guided_choice: None = None
    guided_grammar: None = None
    structured_outputs: None = None
    kv_transfer_params: None = None

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

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_special_tokens: bool | None = None
    suffix: Literal[None, ""] = None
    response_format: None = None

    @model_validator(mode="after")
    def _no_prompt_logprobs(self) -> CompletionRequest:
        if self.echo and self.logprobs is not None:
            raise ValueError("echo together with logprobs is not supported")
        return self


class TextPart(_Body):
    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn. Content is text; parts of other types, and tool calls, are refused."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    refusal: None = None
    audio: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError("content is required")
        return self

    def plain(self) -> dict[str, Any]:
        """As chat templates take it. `developer` is OpenAI's newer word for `system`."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content or ())
        role = "system" if self.role == "developer" else self.role
        turn: dict[str, Any] = {"role": role, "content": content}
        for key in ("name", "tool_call_id", "reasoning_content"):
            value = getattr(self, key)
            if value is not None:
                turn[key] = value
        return turn


class TextFormat(_Body):
    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, str | bool | int | None] | None = None
    response_format: TextFormat | None = None
    reasoning_effort: str | None = Field(default=None, max_length=64)
    # known, and refused unless off
    verbosity: None = None
    chat_template: None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal[None, "none", "auto"] = None
    functions: None = None
    function_call: Literal[None, "none", "auto"] = None
    documents: None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    web_search_options: None = None
    echo: Off = None

    @property
    def template_options(self) -> dict[str, str | bool | int | None]:
        """Variables for the chat template. How much to reason is the template's to say; `chat_template_kwargs` win."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {**effort, **(self.chat_template_kwargs or {})}

    @model_validator(mode="after")
    def _consistent(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self


class TokenizeRequest(_Body):
    """POST /tokenize, with vLLM's shape: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeRequest(_Body):
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
    if kind == "extra_forbidden":
        return f"{param}: unknown field"
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
