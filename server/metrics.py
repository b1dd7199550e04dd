"""Prometheus metrics of one server, on a registry of its own."""

import platform
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence

from fastapi import FastAPI, Response
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.process_collector import ProcessCollector

from engine.adapter_store import AdapterStore
from engine.request import Event, Failed, Finished, Piece, Request
from server.metrics_adapters import AdapterCollector, AdapterCounts
from server.metrics_engine import ExpertCollector, LoadCollector, PlanCollector, WorkCollector
from server.metrics_tokens import TokenCounts
from server.protocol import Engine
from server.versions import installed_version

# From a tiny model on a laptop to an offloaded one of 198 billion parameters.
WAIT_BUCKETS_S = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5),
    *(1, 2.5, 5, 10, 20, 40, 80, 160, 640, 2560),
)
TOKEN_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000)

TELL_S = 1.0  # how long tokens may be missing in the counts of their adapter


class Metrics:
    """All that is counted. Route labels are templates, never raw paths."""

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests", "route", "status")
        self.errors = self._counter("errors", "HTTP requests that got an error, by code", "code")
        self.limited = self._counter("rate_limited", "Requests beyond a key's limit", "reason")
        self.latency = Histogram(
            "infmoe_request_seconds",
            "Time from request to end of reply",
            ["route"],
            registry=self.registry,
            buckets=WAIT_BUCKETS_S,
        )
        text = "HTTP requests being answered"
        self.in_flight = Gauge("infmoe_in_flight", text, registry=self.registry)
        self.first_token = self._waits("time_to_first_token", "From submission to the first token")
        self.queued = self._waits("queue", "From submission to the encoder")
        self.encode = self._waits("encode", "In the encoder")
        self.decode = self._waits("decode", "From the end of the encoder to the last token")
        self.tokens_in = self._counter("prompt_tokens", "Encoder tokens")
        self.tokens = TokenCounts(WAIT_BUCKETS_S)
        self.registry.register(self.tokens)
        self.sizes_in = self._sizes("choice_prompt_tokens", "Encoder tokens of a choice")
        self.sizes_out = self._sizes("choice_generated_tokens", "Generated tokens of a choice")
        self.ends = self._counter("finished", "Choices by end", "reason")
        self.adapters = AdapterCounts(self.registry)
        for collector in (LoadCollector, WorkCollector, ExpertCollector, PlanCollector):
            self.registry.register(collector(engine))
        ProcessCollector(namespace="infmoe", registry=self.registry)
        if (process_id := getattr(engine, "process_id", None)) is not None:
            own = "infmoe_engine"
            ProcessCollector(own, pid=lambda: process_id, registry=self.registry)
        self._tell_build(engine)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"infmoe_{name}", text, labels, registry=self.registry)

    def _waits(self, name: str, text: str) -> Histogram:
        name = f"infmoe_{name}_seconds"
        return Histogram(name, text, registry=self.registry, buckets=WAIT_BUCKETS_S)

    def _sizes(self, name: str, text: str) -> Histogram:
        return Histogram(f"infmoe_{name}", text, registry=self.registry, buckets=TOKEN_BUCKETS)

    def _tell_build(self, engine: Engine) -> None:
        names = ["version", "python", "torch", "model"]
        text = "1; what is served by what"
        family = Gauge("infmoe_build_info", text, names, registry=self.registry)
        values = (installed_version(), platform.python_version(), installed_version("torch"))
        family.labels(*values, engine.model_name).set(1)

    def tell_limits(self, max_queue: int) -> None:
        """Tell how many requests may wait, which `infmoe_queue_depth` is to be compared with."""
        limit = Gauge("infmoe_queue_limit", "Requests that may wait", registry=self.registry)
        limit.set(max_queue)

    def watch_adapters(self, store: AdapterStore) -> None:
        """Tell of a store of adapters; counts of those that it evicts are dropped."""
        self.registry.register(AdapterCollector(store, self.adapters))

    def record(self, route: str, status: int, wait_s: float, notes: Mapping[str, object]) -> None:
        """Count one HTTP request at its end; `notes` may tell the code of its error."""
        self.requests.labels(route, str(status)).inc()
        self.latency.labels(route).observe(wait_s)
        if "error" in notes:
            self.errors.labels(str(notes["error"])).inc()
        if "limit" in notes:
            self.limited.labels(str(notes["limit"])).inc()


class Meter:
    """Counts what passes, and keeps the ends for who traces the request.

    With `state`, that of the HTTP request, it is found there as "meter" and closed at the end.
    """

    def __init__(
        self,
        metrics: Metrics,
        requests: Sequence[Request] = (),
        state: MutableMapping[str, object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._clock = clock
        self._start_s = clock()
        self._last_s: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._first_s: float | None = None
        self._is_closed = False
        self._num_untold = 0  # tokens that the counts of the adapter lack
        self._told_s = self._start_s
        self.began_ns = time.time_ns()
        self.requests = requests
        self.ends: dict[int, Finished | Failed] = {}
        adapter = requests[0].adapter if requests else None
        self._adapter = adapter.name if adapter else None
        if state is not None:
            state["meter"] = self
        metrics.adapters.count_request(self._adapter)

    def first_token_ms(self) -> float | None:
        """Time from the start to the first token of any choice."""
        return None if self._first_s is None else round(self._first_s * 1000, 1)

    def see(self, index: int, event: Event) -> int:
        """Count one event of choice `index`; returns how many tokens it told of.

        Of what comes after the end of the HTTP request only tokens are counted.
        """
        num_tokens = self._new_tokens(index, event)
        if self._is_closed:
            self._count_tokens(index, num_tokens)
            self._tell_adapter(self._clock())
        elif isinstance(event, Piece):
            if num_tokens:  # else it is text that was held back
                self._see_piece(index, num_tokens)
        elif isinstance(event, Finished):
            self.ends[index] = event
            self._see_end(index, event, num_tokens)
        elif isinstance(event, Failed):
            self.ends[index] = event
            self._metrics.ends.labels(end_reason(event)).inc()
        return num_tokens

    def _new_tokens(self, index: int, event: Event) -> int:
        """Tokens that an event tells of; an end of marks and answers, of which no piece told."""
        if isinstance(event, Piece):
            return len(event.token_ids)
        if isinstance(event, Finished):
            return max(0, event.completion_tokens - self._num_tokens.get(index, 0))
        return 0

    def close(self) -> None:
        """The HTTP request is over: what has not ended has been cancelled. Again: nothing."""
        if self._is_closed:
            return
        self._is_closed = True
        self._tell_adapter(self._clock())
        for index in range(len(self.requests)):
            if index not in self.ends:
                self._metrics.ends.labels("cancelled").inc()

    def account(self) -> dict[str, object]:
        """What came of the choices, for the log; nothing where none was asked for."""
        if not self.requests:
            return {}
        finished = [end for end in self.ends.values() if isinstance(end, Finished)]
        unfinished = [n for index, n in self._num_tokens.items() if index not in self.ends]
        reasons = {end_reason(end) for end in self.ends.values()}
        if len(self.ends) < len(self.requests):
            reasons.add("cancelled")
        return {
            "choices": len(self.requests),
            "prompt_tokens": sum(end.prompt_tokens for end in finished),
            "completion_tokens": sum(e.completion_tokens for e in finished) + sum(unfinished),
            "finish": ",".join(sorted(reasons)),
        }

    def _see_end(self, index: int, end: Finished, num_tokens: int) -> None:
        metrics = self._metrics
        metrics.ends.labels(end_reason(end)).inc()
        metrics.queued.observe(end.queued_s)
        metrics.encode.observe(end.encode_s)
        metrics.decode.observe(end.decode_s)
        metrics.tokens_in.inc(end.prompt_tokens)
        metrics.sizes_in.observe(end.prompt_tokens)
        metrics.sizes_out.observe(end.completion_tokens)
        self._count_tokens(index, num_tokens)
        metrics.adapters.count_prompt(self._adapter, end.prompt_tokens)
        self._tell_adapter(self._clock())

    def _see_piece(self, index: int, num_tokens: int) -> None:
        now_s = self._clock()
        last_s = self._last_s.get(index)
        self._last_s[index] = now_s
        self._count_tokens(index, num_tokens)
        if last_s is None:
            self._metrics.first_token.observe(now_s - self._start_s)
            if self._first_s is None:
                self._first_s = now_s - self._start_s
            return
        self._metrics.tokens.note_gap(now_s - last_s, num_tokens)
        if now_s - self._told_s >= TELL_S:
            self._tell_adapter(now_s)

    def _count_tokens(self, index: int, num_tokens: int) -> None:
        self._num_tokens[index] = self._num_tokens.get(index, 0) + num_tokens
        self._metrics.tokens.num_tokens += num_tokens
        self._num_untold += num_tokens

    def _tell_adapter(self, now_s: float) -> None:
        """Count the tokens of an adapter; not each for itself, as that takes longer."""
        self._told_s = now_s
        if self._num_untold:
            self._metrics.adapters.count_generated(self._adapter, self._num_untold)
            self._num_untold = 0


def end_reason(end: Finished | Failed) -> str:
    """How the end of a choice is counted."""
    if isinstance(end, Finished):
        is_late = end.reason == "length" and end.stop_reason == "timeout"
        return "timeout" if is_late else end.reason
    if end.is_late:
        return "timeout"
    return "shutdown" if end.is_shutdown else "failed"


def add_metrics_route(app: FastAPI, metrics: Metrics) -> None:
    """Serve /metrics in the text format of Prometheus."""

    @app.get("/metrics", response_class=Response)
    async def read_metrics() -> Response:
        """Counters, gauges and histograms for Prometheus."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
