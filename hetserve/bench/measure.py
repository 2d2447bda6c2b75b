"""What one request met with, measured at the client: sends it, stamps what comes back, never raises."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from hetserve.async_client import AsyncClient
from hetserve.bench.workload import Arrival, PromptMaker
from hetserve.errors import APIError, StatusError, StreamError


@dataclass(frozen=True)
class Outcome:
    """One request. Times in seconds from the start of the run; `chunk_s` are the arrivals of what carried text or the end.

    Attributes:
        due_s: when it should have been sent; `sent_s` when it was.
        prompt_tokens, output_tokens: as the server counted them.
        error: the kind of error that ended it, with the server's code; None for a complete answer.
    """

    due_s: float
    sent_s: float
    done_s: float
    chunk_s: tuple[float, ...] = ()
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str | None = None

    @property
    def ttft_s(self) -> float | None:
        return self.chunk_s[0] - self.sent_s if self.chunk_s else None

    @property
    def tpot_s(self) -> float | None:
        """Mean time per token after the first; None before there are two."""
        if self.output_tokens < 2 or len(self.chunk_s) < 2:
            return None
        return (self.chunk_s[-1] - self.chunk_s[0]) / (self.output_tokens - 1)

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between chunks: the inter-token latency that a reader sees."""
        return tuple(later - sooner for sooner, later in zip(self.chunk_s, self.chunk_s[1:], strict=False))

    @property
    def e2e_s(self) -> float:
        return self.done_s - self.sent_s


async def run_open_loop(
    client: AsyncClient,
    arrivals: Sequence[Arrival],
    prompts: PromptMaker,
    *,
    model: str,
    on_done: Callable[[Outcome], None],
    temperature: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> list[Outcome]:
    """Send every request at its time, however many are still unanswered (an open loop), and wait for all.

    The client should not retry: a retry is an error of the first try.
    """
    started_s = clock()

    async def one(index: int, arrival: Arrival) -> Outcome:
        prompt = prompts.prompt(index, arrival.input_tokens)
        outcome = await _measure(client, arrival, prompt, model, temperature, lambda: clock() - started_s)
        on_done(outcome)
        return outcome

    async with asyncio.TaskGroup() as group:
        tasks = []
        for index, arrival in enumerate(arrivals):
            wait_s = started_s + arrival.at_s - clock()
            if wait_s > 0:
                await sleep(wait_s)
            tasks.append(group.create_task(one(index, arrival)))
    return [task.result() for task in tasks]


async def _measure(
    client: AsyncClient, arrival: Arrival, prompt: list[int], model: str, temperature: float, now: Callable[[], float]
) -> Outcome:
    sent_s = now()
    stamps: list[float] = []
    prompt_tokens = output_tokens = 0
    error: str | None = None
    try:
        async with await client.stream_completions(
            prompt, model=model, max_tokens=arrival.output_tokens, ignore_eos=True, temperature=temperature
        ) as stream:
            async for chunk in stream:
                if any(choice.text or choice.finish_reason or choice.token_ids for choice in chunk.choices):
                    stamps.append(now())
                if chunk.usage is not None:
                    prompt_tokens, output_tokens = chunk.usage.prompt_tokens, chunk.usage.completion_tokens
        if output_tokens == 0:
            error = "NoUsage"
    except APIError as failure:
        error = error_name(failure)
    return Outcome(arrival.at_s, sent_s, now(), tuple(stamps), prompt_tokens, output_tokens, error)


def error_name(error: APIError) -> str:
    """`RateLimited (overloaded)`: the class, and the server's code where it gave one."""
    code = error.code if isinstance(error, StatusError | StreamError) else None
    return type(error).__name__ + (f" ({code})" if code else "")
