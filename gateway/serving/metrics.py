"""The gateway's Prometheus metrics, on a registry of their own so that two gateways in one process do not clash.

Counters and histograms are fed as things happen; gauges about instances are read from the router's snapshot when
somebody scrapes, so that a dead instance's series disappear with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from core.groups import block_bytes
from gateway.serving.journal import Entry, Outcome
from router.state import Snapshot

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1200.0, 3600.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """All series begin with `hetserve_`."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self._requests = Counter("hetserve_requests", "Generations ended, by outcome", ["outcome"], registry=registry)
        self._errors = Counter("hetserve_errors", "Errors answered to clients, by code", ["code"], registry=registry)
        self._retries = Counter("hetserve_retries", "Attempts that failed and were retried, by code", ["code"], registry=registry)
        self._prompt_tokens = Counter("hetserve_prompt_tokens", "Prompt tokens accepted", registry=registry)
        self._cached_tokens = Counter("hetserve_cached_prompt_tokens", "Prompt tokens found in prefix caches", registry=registry)
        self._output_tokens = Counter("hetserve_output_tokens", "Tokens generated", registry=registry)
        self._kv_bytes = Counter("hetserve_kv_transfer_bytes", "KV bytes moved between instances", registry=registry)
        self._in_flight = Gauge("hetserve_in_flight", "Generations in flight", registry=registry)
        self._ttft = Histogram("hetserve_ttft_seconds", "Time to first token", buckets=_SECONDS, registry=registry)
        self._tpot = Histogram("hetserve_tpot_seconds", "Mean time per output token", buckets=_TOKEN_SECONDS, registry=registry)
        self._itl = Histogram("hetserve_itl_seconds", "Gaps between tokens", buckets=_TOKEN_SECONDS, registry=registry)
        self._e2e = Histogram("hetserve_e2e_seconds", "Whole generation", buckets=_SECONDS, registry=registry)

    def watch(self, snapshot: Callable[[], Snapshot]) -> None:
        """Read the instance gauges from `snapshot` at each scrape."""
        self.registry.register(_Instances(snapshot))

    def accepted(self) -> None:
        """A generation begins. Its prompt is counted by `prompts`, once for all that it is the prompt of."""
        self._in_flight.inc()

    def prompts(self, tokens: int) -> None:
        """A request's prompts were accepted: `tokens` of all of them, whatever `n`."""
        self._prompt_tokens.inc(tokens)

    def cached(self, tokens: int) -> None:
        """Of a request's prompts, so many were in prefix caches; each prompt counts once here too."""
        self._cached_tokens.inc(tokens)

    def tokens(self, entry: Entry, count: int, gap_s: float | None) -> None:
        """`count` tokens arrived `gap_s` after the last ones; None for the first."""
        self._output_tokens.inc(count)
        if gap_s is not None:
            self._itl.observe(gap_s)
        elif entry.times.ttft_s is not None:
            self._ttft.observe(entry.times.ttft_s)

    def retried(self, code: str) -> None:
        self._retries.labels(code).inc()

    def refused(self, code: str) -> None:
        self._errors.labels(code).inc()

    def ended(self, entry: Entry) -> None:
        outcome = entry.outcome or Outcome.FAILED
        self._in_flight.dec()
        self._requests.labels(outcome.value).inc()
        self._kv_bytes.inc(entry.kv_bytes)
        if outcome is Outcome.COMPLETED:
            if entry.times.tpot_s is not None:
                self._tpot.observe(entry.times.tpot_s)
            if entry.times.total_s is not None:
                self._e2e.observe(entry.times.total_s)

    def render(self) -> bytes:
        return generate_latest(self.registry)


class _Instances(Collector):
    """Gauges of every live instance, made at scrape time."""

    def __init__(self, snapshot: Callable[[], Snapshot]) -> None:
        self._snapshot = snapshot

    def collect(self) -> Iterator[GaugeMetricFamily]:
        labels = ["instance", "role", "accelerator"]
        gauges = {
            name: GaugeMetricFamily(f"hetserve_instance_{name}", text, labels=labels)
            for name, text in (
                ("running", "Sequences running"),
                ("waiting", "Sequences waiting"),
                ("waiting_tokens", "Prompt tokens waiting"),
                ("free_blocks", "KV blocks free"),
                ("total_blocks", "KV blocks"),
                ("kv_used_bytes", "KV bytes in use"),
                ("draining", "1 while draining"),
                ("stuck", "1 while no step is made in spite of work"),
            )
        }
        for item in self._snapshot().instances:
            load, beat = item.load, item.beat
            used_bytes = (beat.total_blocks - load.free_blocks) * block_bytes(beat.layout, item.groups)
            values = {
                "running": load.running,
                "waiting": load.waiting,
                "waiting_tokens": load.waiting_tokens,
                "free_blocks": load.free_blocks,
                "total_blocks": beat.total_blocks,
                "kv_used_bytes": used_bytes,
                "draining": load.draining,
                "stuck": item.stuck,
            }
            for name, value in values.items():
                gauges[name].add_metric([item.name, item.role.value, beat.accelerator], float(value))
        yield from gauges.values()
