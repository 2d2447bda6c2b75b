"""The routes that generate, and those around them that need the tokenizer. What they accept is `gateway.protocol.bodies`'s."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from core.clock import Clock
from core.config import GatewayConfig
from core.errors import InvalidRequest
from gateway.http.body import read_body
from gateway.http.json_response import JSON
from gateway.protocol.answers import Answer, AnswerOptions, ChatShape, Choice, CompletionShape, Shape
from gateway.protocol.bodies import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest, parse
from gateway.protocol.fields import Body, header_value, ignored_fields
from gateway.protocol.large_bodies import LARGE_BODY_BYTES, parse_large
from gateway.routes.call import Call, EventStream, collect
from gateway.serving.inbox import Inbox
from gateway.serving.intake import Intake, Prepared
from gateway.serving.metrics import Metrics

B = TypeVar("B", bound=Body)

WRITE_SLACK_S = 60.0
IGNORED_HEADER = "x-hetserve-ignored"
"""Names the fields of a request that were taken and not read."""


@dataclass(frozen=True)
class GeneratingRoutes:
    """Request handlers; each raises typed errors and leaves their shape to the application."""

    intake: Intake
    config: GatewayConfig
    clock: Clock
    metrics: Metrics

    async def completions(self, request: Request) -> Response:
        arrived_s = self.clock.now()
        body, ignored = await self._parse(CompletionRequest, request)
        prepared = await self.intake.prepare(body)
        shape = CompletionShape(prepared.prompt_texts, prepared.n)
        return await self._answer(request, prepared, shape, arrived_s, body.logprobs is not None, ignored)

    async def chat(self, request: Request) -> Response:
        arrived_s = self.clock.now()
        body, ignored = await self._parse(ChatRequest, request)
        prepared = await self.intake.prepare(body)
        shape = ChatShape(self.intake.codec.token_bytes)
        return await self._answer(request, prepared, shape, arrived_s, bool(body.logprobs), ignored)

    async def tokenize(self, request: Request) -> Response:
        body, ignored = await self._parse(TokenizeRequest, request)
        self.intake.check_model(body.model)
        if body.prompt is not None:
            tokens = await self.intake.encode_text(body.prompt, body.add_special_tokens is not False)
        else:
            tokens = await self.intake.encode_chat(
                body.messages or [],
                body.add_generation_prompt,
                body.continue_final_message,
                special=bool(body.add_special_tokens),
                template_options=body.chat_template_kwargs,
            )
        token_strs = await self.intake.token_strs(tokens) if body.return_token_strs else None
        said = {"count": len(tokens), "max_model_len": self.intake.max_model_len, "tokens": tokens, "token_strs": token_strs}
        return JSON(said, headers=ignored)

    async def detokenize(self, request: Request) -> Response:
        body, ignored = await self._parse(DetokenizeRequest, request)
        self.intake.check_model(body.model)
        return JSON({"prompt": await self.intake.decode_ids(body.tokens, "tokens")}, headers=ignored)

    async def _parse(self, kind: type[B], request: Request) -> tuple[B, dict[str, str]]:
        """The body, and the header that names what of it nobody reads, if there is such."""
        data = await self._read(request)
        if len(data) <= LARGE_BODY_BYTES:
            body = parse(kind, data)
        else:
            body = await self.intake.off_loop(partial(parse_large, kind, data, self.intake.max_model_len))
        names = header_value(ignored_fields(body))
        return body, {IGNORED_HEADER: names} if names else {}

    async def _read(self, request: Request) -> bytes:
        kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise InvalidRequest(f"content-type must be application/json, got {kind!r}")
        return await read_body(request, self.config.max_body_bytes, self.config.read_timeout_s)

    async def _answer(
        self,
        request: Request,
        prepared: Prepared,
        shape: Shape,
        arrived_s: float,
        with_logprobs: bool,
        headers: dict[str, str],
    ) -> Response:
        body, inbox = prepared.body, Inbox()
        options = AnswerOptions(with_logprobs, bool(body.return_token_ids), body.wants_usage, body.wants_running_usage)
        answer = Answer(
            shape,
            request.state.request_id,
            self.intake.model.name,
            int(time.time()),
            self.intake.codec.token_text,
            options,
        )
        generations = await self.intake.start(prepared, request.state.request_id, arrived_s, inbox, request.state.salt)
        self.metrics.prompts(sum(map(len, prepared.prompts)))
        call = Call(
            intake=self.intake,
            generations=generations,
            inbox=inbox,
            choices=[Choice(index, prepared.prompts[index // prepared.n]) for index in range(len(generations))],
            answer=answer,
            with_usage=body.wants_usage,
            traced=request.headers.get("x-hetserve-trace") == "1",
            write_timeout_s=self.config.request_timeout_s + WRITE_SLACK_S,
            metrics=self.metrics,
        )
        if body.stream:
            return EventStream(call, headers)
        return JSON(await collect(call, request.receive), headers=headers)
