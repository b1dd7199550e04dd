"""Prometheus metrics of one server, on a registry of its own."""

import time
from collections.abc import Iterator

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from engine.request import Event, Failed, Finished, Piece
from server.protocol import Engine

# From a tiny model on a laptop to an offloaded one of 198 billion parameters.
WAIT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 20, 40, 80, 160, 640),
)


class Metrics:
    """All that is counted. Route labels are templates, never raw paths."""

    def __init__(self, engine: Engine) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.requests = Counter(
            "infmoe_requests", "HTTP requests", ["route", "status"], registry=registry
        )
        self.latency = Histogram(
            "infmoe_request_seconds",
            "Time from request to end of reply",
            ["route"],
            registry=registry,
            buckets=WAIT_BUCKETS_S,
        )
        self.in_flight = Gauge(
            "infmoe_in_flight", "HTTP requests being answered", registry=registry
        )
        self.first_token = self._waits(
            "infmoe_time_to_first_token_seconds", "Time from submission to the first token"
        )
        self.inter_token = self._waits(
            "infmoe_inter_token_seconds", "Time between tokens of one choice"
        )
        self.queued = self._waits("infmoe_queue_seconds", "Time from submission to the encoder")
        self.tokens_in = Counter("infmoe_prompt_tokens", "Encoder tokens", registry=registry)
        self.tokens_out = Counter("infmoe_generated_tokens", "Generated tokens", registry=registry)
        self.ends = Counter("infmoe_finished", "Choices by end", ["reason"], registry=registry)
        self._watch(engine)

    def _waits(self, name: str, text: str) -> Histogram:
        return Histogram(name, text, registry=self.registry, buckets=WAIT_BUCKETS_S)

    def _watch(self, engine: Engine) -> None:
        live = {
            "infmoe_queue_depth": ("Requests waiting", lambda: engine.stats().queued),
            "infmoe_running": ("Requests running", lambda: engine.stats().running),
            "infmoe_ready": ("1 if requests are served", lambda: engine.state == "ready"),
        }
        for name, (text, read) in live.items():
            Gauge(name, text, registry=self.registry).set_function(read)
        self.registry.register(ExpertCollector(engine))
        self.registry.register(PlanCollector(engine))


class ExpertCollector(Collector):
    """Counts of offloaded experts, which the engine keeps; nothing where all are resident."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[CounterMetricFamily]:
        """The counts as they are now."""
        stats = self._engine.stats().experts
        if stats is None:
            return
        counts = {
            "infmoe_expert_hits": ("Wanted experts found in memory", stats.hits),
            "infmoe_expert_misses": ("Wanted experts that were not in a slot", stats.misses),
            "infmoe_expert_host_loads": ("Misses found in host memory", stats.host_loads),
            "infmoe_expert_evictions": ("Experts that made room", stats.evictions),
            "infmoe_expert_read_bytes": ("Bytes of experts read from disk", stats.read_bytes),
            "infmoe_expert_copied_bytes": (
                "Bytes of experts copied from host memory",
                stats.copied_bytes,
            ),
            "infmoe_expert_prefetched": ("Experts fetched on a guess", stats.prefetched),
            "infmoe_expert_prefetch_used": ("Guesses that were right", stats.prefetch_used),
            "infmoe_expert_prefetch_wasted": ("Guesses that were wrong", stats.prefetch_wasted),
            "infmoe_expert_stall_seconds": ("Time spent waiting for experts", stats.stall_s),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(name, text, value=value)


class PlanCollector(Collector):
    """What the memory is planned for, and what works in a slower way than it should."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """Both as they are now; the plan once there is one."""
        plan = self._engine.plan
        if plan is not None:
            text = "Bytes that the plan gives to each part"
            family = GaugeMetricFamily("infmoe_plan_bytes", text, labels=["part"])
            for part, size in plan.parts().items():
                family.add_metric([part.replace(" ", "_").lower()], size)
            yield family
        family = GaugeMetricFamily("infmoe_fallbacks", "1 for each slower way", labels=["what"])
        for fallback in dict.fromkeys(self._engine.fallbacks):
            family.add_metric([fallback], 1)
        yield family


class Meter:
    """Measures the choices of one HTTP request while their events pass."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._start_s = time.monotonic()
        self._last_s: dict[int, float] = {}
        self._first_s: float | None = None

    def first_token_ms(self) -> float | None:
        """Time from the start to the first token of any choice."""
        return None if self._first_s is None else round(self._first_s * 1000, 1)

    def see(self, index: int, event: Event) -> None:
        """Count one event of choice `index`."""
        if isinstance(event, Piece):
            if event.token_ids:  # else it is text that was held back
                self._see_piece(index, len(event.token_ids))
        elif isinstance(event, Finished):
            self._metrics.ends.labels(event.reason).inc()
            self._metrics.queued.observe(event.queued_s)
            self._metrics.tokens_in.inc(event.prompt_tokens)
            self._metrics.tokens_out.inc(event.completion_tokens)
        elif isinstance(event, Failed):
            self._metrics.ends.labels("failed").inc()

    def _see_piece(self, index: int, num_tokens: int) -> None:
        now_s = time.monotonic()
        last_s = self._last_s.get(index)
        self._last_s[index] = now_s
        if last_s is None:
            self._metrics.first_token.observe(now_s - self._start_s)
            if self._first_s is None:
                self._first_s = now_s - self._start_s
            return
        for _ in range(num_tokens):  # tokens of one piece share its time
            self._metrics.inter_token.observe((now_s - last_s) / num_tokens)


def add_metrics_route(app: FastAPI, metrics: Metrics) -> None:
    """Serve /metrics in the text format of Prometheus."""

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
