"""From a checked request body to generations under way: prompts, limits, sampling parameters, seeds.

Everything that can be wrong with a request is found here or before, so that whatever reaches a worker can be served.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

import msgspec

from core.clock import Clock
from core.errors import ContextLengthExceeded, InvalidRequest, ModelNotFound, Unavailable
from core.request import Request
from core.sampling import MAX_SEED, SamplingParams
from gateway.protocol.bodies import MAX_PROMPTS, ChatRequest, CompletionRequest, GenerationRequest, Message
from gateway.serving.dispatcher import Dispatcher
from gateway.serving.generation import Generation
from gateway.serving.inbox import Inbox
from gateway.serving.sampling_defaults import SamplingDefaults
from gateway.text.codec import TextCodec, some_of
from gateway.text.token_reader import TextOptions
from gateway.text.tokenizing import Tokenizing

T = TypeVar("T")

TOKENS_PER_TURN = 32 * 1024
"""Prompt tokens started before the loop's other tasks get their turn."""
DEFAULT_COMPLETION_TOKENS = 16
TEMPLATE_OPTIONS_NOT_ALLOWED = frozenset(
    {"conversation", "chat_template", "tokenize", "tools", "documents", "messages", "add_generation_prompt"}
    | {"continue_final_message", "return_dict", "return_tensors", "padding", "truncation", "max_length", "tokenizer_kwargs"}
    | {"return_assistant_tokens_mask", "load_audio_from_video", "processor_kwargs"}
)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What this gateway serves, under which names (answers say the first), loaded from what, since when (Unix time)."""

    names: tuple[str, ...]
    root: str
    created_s: int
    max_model_len: int | None
    defaults: SamplingDefaults

    @property
    def name(self) -> str:
        return self.names[0]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request that can be started: `prompts` of `n` generations each, and what its answer will need."""

    body: GenerationRequest
    prompts: list[list[int]]
    n: int
    sampling: list[SamplingParams]
    options: TextOptions
    prompt_texts: list[str] | None


class Intake:
    """Prepares and starts requests."""

    def __init__(
        self, model: ModelInfo, codec: TextCodec, tokenizing: Tokenizing, dispatcher: Dispatcher, clock: Clock, max_n: int
    ) -> None:
        self.model = model
        self.codec = codec
        self.dispatcher = dispatcher
        self._tokenizing = tokenizing
        self._clock = clock
        self._max_n = max_n

    @property
    def longest_context(self) -> int | None:
        """How long a context may be, as the configuration and the live instances say; None while neither does."""
        return min(filter(None, (self.model.max_model_len, self.dispatcher.snapshot().max_model_len)), default=None)

    @property
    def max_model_len(self) -> int:
        """`longest_context`. Raises Unavailable before anything says how long a context may be."""
        limit = self.longest_context
        if limit is None:
            raise Unavailable("no live instance yet")
        return limit

    def check_model(self, name: str | None) -> None:
        if name is not None and name not in self.model.names:
            known = ", ".join(f"`{known}`" for known in self.model.names)
            raise ModelNotFound(f"The model `{name}` does not exist; this server has {known}")

    async def prepare(self, body: CompletionRequest | ChatRequest) -> Prepared:
        """Raises InvalidRequest, ModelNotFound, Unavailable or Overloaded, all before anything is started."""
        self.check_model(body.model)
        n = body.n or 1
        if n > self._max_n:
            raise InvalidRequest(f"n: at most {self._max_n}", "n")
        self._check_total(n, body)
        self.dispatcher.admit(n)
        if isinstance(body, ChatRequest):
            ids = await self.encode_chat(
                body.messages,
                body.add_generation_prompt,
                body.continue_final_message,
                bool(body.add_special_tokens),
                body.template_options,
            )
            prompts = [ids]
        else:
            prompts = await self._encode_prompts(body)
        self.dispatcher.admit(n * len(prompts))
        sampling = [
            self._sampling(body, prompt, secrets.randbelow(MAX_SEED) if body.seed is None else body.seed) for prompt in prompts
        ]
        texts = None
        show_all = body.skip_special_tokens is False
        decode = self.codec.show_all if show_all else self.codec.skip_special
        if isinstance(body, CompletionRequest) and body.echo:
            given = _prompts(body)
            texts = await self.off_loop(lambda: [item if isinstance(item, str) else decode(item) for item in given])
        options = TextOptions(
            decode=decode,
            skipped=frozenset() if show_all else self.codec.special_ids,
            stop=body.stops,
            include_stop=bool(body.include_stop_str_in_output),
            min_tokens=body.min_tokens or 0,
        )
        return Prepared(body, prompts, n, sampling, options, texts)

    async def start(
        self, prepared: Prepared, request_id: str, arrived_s: float, inbox: Inbox, salt: bytes = b""
    ) -> list[Generation]:
        """Start all generations or none, pausing now and then when there are many. Index `prompt * n + i` draws with the
        i-th seed. `salt` is the tenant's.

        Raises:
            Overloaded, Unavailable: the router refused one; the others are closed again.
        """
        started: list[Generation] = []
        prompt: tuple[int, ...] = ()
        turn_tokens = 0
        try:
            for index in range(len(prepared.prompts) * prepared.n):
                which, repeat = divmod(index, prepared.n)
                if repeat == 0:
                    prompt = tuple(prepared.prompts[which])
                turn_tokens += len(prompt)
                if turn_tokens > TOKENS_PER_TURN and started:
                    turn_tokens = len(prompt)
                    await asyncio.sleep(0)
                self.dispatcher.admit(1)
                sampling = prepared.sampling[which]
                request = Request(
                    request_id=f"{request_id}-{index}",
                    prompt=prompt,
                    sampling=sampling if repeat == 0 else _reseeded(sampling, repeat),
                    salt=salt,
                    arrived_s=arrived_s,
                )
                started.append(self.dispatcher.start(request, prepared.options, inbox, index))
        except BaseException:
            self.close(started)
            raise
        return started

    def close(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            self.dispatcher.close(generation)

    async def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool | None,
        continue_final: bool | None,
        special: bool = False,
        template_options: dict[str, Any] | None = None,
    ) -> list[int]:
        limit = self.max_model_len
        plain = [message.plain() for message in messages]
        _bounded("messages", sum(len(turn["content"]) for turn in plain), limit)
        options = template_options or {}
        for name in options:
            if name in TEMPLATE_OPTIONS_NOT_ALLOWED or not name.isidentifier():
                raise InvalidRequest(f"chat_template_kwargs.{name}: not allowed", f"chat_template_kwargs.{name}")
        open_turn = not continue_final if add_generation_prompt is None else add_generation_prompt

        def work() -> list[int]:
            text = self.codec.render(plain, open_turn, bool(continue_final), options)
            return self.codec.encode_bounded(text, limit, special)

        return await self._tokenizing.run(work)

    async def encode_text(self, text: str, special: bool, param: str = "prompt") -> list[int]:
        limit = self.max_model_len
        _bounded(param, len(text), limit)
        return await self._tokenizing.run(partial(self.codec.encode_bounded, text, limit, special))

    async def off_loop(self, work: Callable[[], T]) -> T:
        """Run tokenizer work, or anything else that takes long, in its threads."""
        return await self._tokenizing.run(work)

    async def token_strs(self, tokens: Sequence[int]) -> list[str]:
        """Each token's own text."""
        return await self.off_loop(lambda: list(map(self.codec.token_text, tokens)))

    async def decode_ids(self, ids: list[int], param: str) -> str:
        """Raises InvalidRequest when an id is not one of the model's."""
        await self._check_ids([ids], param)
        return await self.off_loop(partial(self.codec.show_all, ids))

    async def _check_ids(self, prompts: Sequence[Sequence[int]], param: str) -> None:
        def work() -> None:
            for ids in prompts:
                self.codec.check_ids(ids, param)

        if sum(map(len, prompts)) <= TOKENS_PER_TURN:
            work()
        else:
            await self.off_loop(work)

    async def _encode_prompts(self, body: CompletionRequest) -> list[list[int]]:
        many = _prompts(body)
        if not many:
            raise InvalidRequest("prompt: must not be empty", "prompt")
        if len(many) > MAX_PROMPTS:
            raise InvalidRequest(f"prompt: at most {MAX_PROMPTS} prompts", "prompt")
        special = body.add_special_tokens is not False
        encoded: list[list[int]] = []
        for item in many:
            if isinstance(item, str):
                encoded.append(await self.encode_text(item, special))
            else:
                encoded.append(item)
        limit = self.max_model_len
        longest = max(map(len, encoded))
        if longest > limit:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens, but the prompt has {longest}", "prompt"
            )
        await self._check_ids(encoded, "prompt")
        return encoded

    def _check_total(self, n: int, body: CompletionRequest | ChatRequest) -> None:
        """Refuse for good what could not be admitted on an empty server either: to come back later would not help."""
        prompts = len(_prompts(body)) if isinstance(body, CompletionRequest) else 1
        limit = self.dispatcher.max_concurrent
        if n * prompts > limit:
            param = "n" if n > limit or prompts == 1 else "prompt"
            raise InvalidRequest(
                f"{param}: {n} generations for {prompts} prompts, this server runs at most {limit} at once", param
            )

    def _sampling(self, body: CompletionRequest | ChatRequest, prompt: list[int], seed: int) -> SamplingParams:
        limit = self.max_model_len
        room = limit - len(prompt)
        if not prompt:
            raise InvalidRequest("the prompt has no tokens", "prompt")
        wanted = body.max_tokens
        if isinstance(body, ChatRequest):
            wanted = body.max_completion_tokens or wanted or self._default_chat_tokens(max(room, 1))
            param, logprobs = "messages", (body.top_logprobs or 0) if body.logprobs else None
        else:
            wanted = min(DEFAULT_COMPLETION_TOKENS, max(room, 1)) if wanted is None else wanted
            param, logprobs = "prompt", body.logprobs
        if room < 1 or wanted > room:
            raise ContextLengthExceeded(
                f"This model's maximum context length is {limit} tokens, but {len(prompt)} tokens of prompt and "
                f"{wanted} of completion were asked for",
                param if room < 1 else "max_tokens",
            )
        stop_token_ids = tuple(body.stop_token_ids or ())
        self.codec.check_ids(stop_token_ids, "stop_token_ids")
        defaults = self.model.defaults
        return SamplingParams(
            max_tokens=wanted,
            min_tokens=body.min_tokens or 0,
            temperature=_or(body.temperature, defaults.temperature),
            top_k=max(defaults.top_k if body.top_k is None else body.top_k, 0),
            top_p=_or(body.top_p, defaults.top_p),
            min_p=_or(body.min_p, defaults.min_p),
            repetition_penalty=_or(body.repetition_penalty, defaults.repetition_penalty),
            presence_penalty=_or(body.presence_penalty, 0.0),
            frequency_penalty=_or(body.frequency_penalty, 0.0),
            logit_bias=self._logit_bias(body.logit_bias),
            seed=seed % (MAX_SEED + 1),
            stop_token_ids=stop_token_ids,
            ignore_eos=bool(body.ignore_eos),
            logprobs=logprobs,
        )

    def _logit_bias(self, given: dict[str, float] | None) -> dict[int, float]:
        given = given or {}
        wrong = [repr(key[:64]) for key in given if not (key.isascii() and key.isdigit() and len(key) <= 10)]
        if wrong:
            raise InvalidRequest(f"logit_bias: keys must be token ids, got {some_of(wrong)}", "logit_bias")
        bias = {int(key): value for key, value in given.items()}
        self.codec.check_ids(list(bias), "logit_bias")
        return bias

    def _default_chat_tokens(self, room: int) -> int:
        return min(self.model.defaults.max_tokens or room, room)


def _prompts(body: CompletionRequest) -> Sequence[str | list[int]]:
    """One element for each prompt, as it was given."""
    prompt = body.prompt
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return cast("Sequence[str | list[int]]", prompt)


def _or(value: float | None, default: float) -> float:
    return default if value is None else float(value)


def _reseeded(sampling: SamplingParams, repeat: int) -> SamplingParams:
    return msgspec.structs.replace(sampling, seed=(sampling.seed + repeat) % (MAX_SEED + 1))


def _bounded(param: str, chars: int, max_tokens: int) -> None:
    """Refuse before tokenising what no tokenizer could fit: real vocabularies have no token of over 256 characters."""
    if chars > max_tokens * 256:
        raise ContextLengthExceeded(
            f"This model's maximum context length is {max_tokens} tokens, but the prompt has {chars} characters", param
        )
