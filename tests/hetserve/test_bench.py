"""The load generator: when requests go out, what is measured, and what it adds up to."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hetserve import AsyncClient, Retries
from hetserve.bench.measure import Outcome, run_open_loop
from hetserve.bench.report import Targets, percentile, report
from hetserve.bench.workload import Arrival, Arrivals, PromptMaker, TraceError, arrival_times, read_trace, synthetic
from tests.hetserve.fake_server import completion_chunk, usage_chunk

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:03.9799600,4808,10
2023-11-16 18:17:04.0319600,3180,8
2023-11-16 18:17:05.9799600,110,0
2023-11-16 18:17:05.9799600,110,27
"""


# --- arrivals ---------------------------------------------------------------------------------------------------------


def test_poisson_arrivals_have_the_rate_and_spread_of_a_poisson_process() -> None:
    times_s = arrival_times(Arrivals.POISSON, 5.0, 20_000, random.Random(1))
    gaps_s = np.diff(times_s)
    assert times_s[0] == 0.0
    assert np.mean(gaps_s) == pytest.approx(0.2, rel=0.03)
    assert np.std(gaps_s) == pytest.approx(0.2, rel=0.05)


def test_constant_and_burst_arrivals_keep_the_rate() -> None:
    assert arrival_times(Arrivals.CONSTANT, 4.0, 4, random.Random(0)) == [0.0, 0.25, 0.5, 0.75]
    assert arrival_times(Arrivals.BURST, 4.0, 5, random.Random(0), burst_size=2) == [0.0, 0.0, 0.5, 0.5, 1.0]


@given(process=st.sampled_from(Arrivals), count=st.integers(1, 50), seed=st.integers(0, 5))
def test_arrivals_are_in_order_and_repeatable(process: Arrivals, count: int, seed: int) -> None:
    first = arrival_times(process, 3.0, count, random.Random(seed))
    assert first == arrival_times(process, 3.0, count, random.Random(seed))
    assert first == sorted(first)
    assert len(first) == count


def test_a_trace_is_read_scaled_and_cut(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(TRACE)
    arrivals = read_trace(path, time_scale=0.5)
    assert [(a.input_tokens, a.output_tokens) for a in arrivals] == [(4808, 10), (3180, 8), (110, 27)]
    assert [a.at_s for a in arrivals] == pytest.approx([0.0, 0.026, 1.0])
    assert len(read_trace(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,b\n1,2\n", "no column ContextTokens, GeneratedTokens, TIMESTAMP"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,2\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,1\n", "line 2"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16,1,1\n2023-11-15,1,1\n", "line 3: earlier"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n", "no requests"),
        ("", "no column"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_by_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(TraceError, match=message):
        read_trace(path)


def test_prompts_differ_by_index_and_repeat_by_seed() -> None:
    maker = PromptMaker(range(100, 200), seed=3)
    assert maker.prompt(1, 32) == PromptMaker(range(100, 200), seed=3).prompt(1, 32)
    assert maker.prompt(1, 32) != maker.prompt(2, 32)
    assert set(maker.prompt(0, 500)) <= set(range(100, 200))


# --- arithmetic -------------------------------------------------------------------------------------------------------


@given(values=st.lists(st.floats(0, 1e3), min_size=1, max_size=60), percent=st.floats(0, 100))
def test_percentiles_are_numpys(values: list[float], percent: float) -> None:
    assert percentile(sorted(values), percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-9)


def outcome(ttft_s: float, gap_s: float, tokens: int, sent_s: float = 0.0, error: str | None = None) -> Outcome:
    stamps = tuple(sent_s + ttft_s + gap_s * i for i in range(tokens))
    return Outcome(sent_s, sent_s, stamps[-1], stamps, prompt_tokens=10, output_tokens=tokens, error=error)


def test_goodput_counts_only_requests_that_met_every_target() -> None:
    outcomes = [
        outcome(0.1, 0.01, 11),
        outcome(0.1, 0.09, 11, sent_s=1.0),  # too slow between tokens
        outcome(0.9, 0.01, 11, sent_s=2.0),  # too late
        outcome(0.1, 0.01, 11, sent_s=3.8, error="RateLimited (overloaded)"),
    ]
    result = report(outcomes, Targets(ttft_s=0.5, tpot_s=0.05))
    assert result.duration_s == pytest.approx(4.0)
    assert result.attainment == 0.25
    assert result.goodput == pytest.approx(1 / 4.0)
    assert result.requests_per_s == pytest.approx(3 / 4.0)
    assert (result.requests, result.completed, result.output_tokens, result.input_tokens) == (4, 3, 33, 30)
    assert result.errors == {"RateLimited (overloaded)": 1}


def test_latencies_are_taken_from_the_stamps() -> None:
    result = report([outcome(0.2, 0.05, 5), outcome(0.4, 0.15, 3)], Targets())
    assert result.spreads["ttft"].p50 == pytest.approx(0.3)
    assert result.spreads["tpot"].p50 == pytest.approx(0.1)
    assert result.spreads["itl"].count == 6
    assert result.spreads["itl"].max == pytest.approx(0.15)
    assert result.spreads["e2e"].max == pytest.approx(0.7)


def test_one_token_answers_have_no_tpot_and_meet_its_target() -> None:
    result = report([outcome(0.2, 0.0, 1)], Targets(tpot_s=0.001))
    assert "tpot" not in result.spreads
    assert result.attainment == 1.0


def test_lateness_of_the_generator_is_reported() -> None:
    late = Outcome(due_s=1.0, sent_s=1.5, done_s=2.0, chunk_s=(1.6,), output_tokens=1)
    assert report([late], Targets()).lag.max == pytest.approx(0.5)


def test_a_report_is_plain_json() -> None:
    result = report([outcome(0.2, 0.05, 5)], Targets(ttft_s=1.0))
    assert json.loads(json.dumps(result.to_json()))["spreads"]["ttft"]["p99"] == pytest.approx(0.2)


# --- measuring, in virtual time ---------------------------------------------------------------------------------------


class VirtualTime:
    """A clock that jumps to the next sleeper whenever nobody can run."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._sleepers: list[tuple[float, int, asyncio.Event]] = []

    def clock(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        wake = asyncio.Event()
        self._sleepers.append((self.now_s + seconds, len(self._sleepers), wake))
        await wake.wait()

    async def drive(self, work: asyncio.Task[list[Outcome]]) -> None:
        while not work.done():
            for _ in range(50):  # let everything that can run, run
                await asyncio.sleep(0)
            if self._sleepers and not work.done():
                self._sleepers.sort(key=lambda sleeper: sleeper[:2])
                self.now_s, _, wake = self._sleepers.pop(0)
                wake.set()


class ScriptedServer(httpx.AsyncBaseTransport):
    """Answers after 100 ms, then a token every 10 ms; the third request is refused, the fourth breaks off."""

    def __init__(self, time: VirtualTime) -> None:
        self._time = time
        self.bodies: list[dict[str, object]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        index = len(self.bodies)
        if index == 3:
            return httpx.Response(429, json={"error": {"message": "full", "code": "overloaded"}})
        content = self._tokens(body, broken=index == 4)
        return httpx.Response(200, headers={"content-type": "text/event-stream"}, stream=_Bytes(content))

    async def _tokens(self, body: dict[str, object], broken: bool) -> AsyncIterator[bytes]:
        count = body["max_tokens"]
        prompt = body["prompt"]
        assert isinstance(count, int)
        assert isinstance(prompt, list)
        for index in range(count):
            await self._time.sleep(0.1 if index == 0 else 0.01)
            if broken and index == 1:
                return
            yield _event(completion_chunk("a", "length" if index == count - 1 else None))
        yield _event(usage_chunk(len(prompt), count))
        yield b"data: [DONE]\n\n"


class _Bytes(httpx.AsyncByteStream):
    def __init__(self, content: AsyncIterator[bytes]) -> None:
        self._content = content

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._content


def _event(data: dict[str, object]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


async def measured(arrivals: list[Arrival]) -> tuple[list[Outcome], list[dict[str, object]]]:
    time = VirtualTime()
    server = ScriptedServer(time)
    async with AsyncClient("http://bench.test", transport=server, retries=Retries(limit=0)) as client:
        loop = run_open_loop(
            client,
            arrivals,
            PromptMaker(range(5, 50), 0),
            model="m",
            on_done=lambda outcome: None,
            clock=time.clock,
            sleep=time.sleep,
        )
        work = asyncio.create_task(loop)
        await time.drive(work)
        return work.result(), server.bodies


async def test_scripted_latencies_are_measured_exactly() -> None:
    outcomes, bodies = await measured(synthetic([0.0, 0.05], input_tokens=7, output_tokens=6))
    assert [o.sent_s for o in outcomes] == pytest.approx([0.0, 0.05])  # open loop: sent before the first was answered
    assert [o.ttft_s for o in outcomes] == pytest.approx([0.1, 0.1])
    assert [o.tpot_s for o in outcomes] == pytest.approx([0.01, 0.01])
    assert outcomes[0].gaps_s == pytest.approx([0.01] * 5)
    assert [(o.prompt_tokens, o.output_tokens, o.error) for o in outcomes] == [(7, 6, None)] * 2
    assert all(body["ignore_eos"] is True and body["max_tokens"] == 6 for body in bodies)


async def test_errors_are_counted_by_kind_and_end_only_their_own_request() -> None:
    outcomes, _ = await measured(synthetic([0.0, 0.2, 0.4, 0.6, 0.8], input_tokens=3, output_tokens=4))
    assert [o.error for o in outcomes] == [None, None, "RateLimited (overloaded)", "StreamError", None]
    assert len(outcomes[3].chunk_s) == 1
