"""Metrics by adapter: as many label values as there is room for, and none of adapters that left."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from engine.adapter_store import AdapterStore
from engine.errors import RequestError

MAX_NAMES = 64
BASE = "(base)"  # no adapter is called so, nor like the next one
OTHER = "(other)"


class AdapterCounts:
    """Requests and tokens by adapter. The name of an adapter is None for the base model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._names: set[str] = set()
        self._counters = {
            name: Counter(f"infmoe_adapter_{name}", text, ["adapter"], registry=registry)
            for name, text in {
                "requests": "HTTP requests by adapter",
                "prompt_tokens": "Encoder tokens by adapter",
                "generated_tokens": "Generated tokens by adapter",
            }.items()
        }

    def count_request(self, adapter: str | None) -> None:
        """One HTTP request."""
        self._counters["requests"].labels(self._label(adapter)).inc()

    def count_prompt(self, adapter: str | None, num_tokens: int) -> None:
        """Tokens that the encoder read."""
        self._counters["prompt_tokens"].labels(self._label(adapter)).inc(num_tokens)

    def count_generated(self, adapter: str | None, num_tokens: int) -> None:
        """Tokens that were generated."""
        self._counters["generated_tokens"].labels(self._label(adapter)).inc(num_tokens)

    def keep(self, is_kept: Callable[[str], bool]) -> None:
        """Drop the counts of the adapters of which that is not true."""
        for name in [name for name in self._names if not is_kept(name)]:
            self._names.discard(name)
            for counter in self._counters.values():
                counter.remove(name)

    def _label(self, adapter: str | None) -> str:
        if adapter is None:
            return BASE
        if adapter not in self._names:
            if len(self._names) >= MAX_NAMES:
                return OTHER
            self._names.add(adapter)
        return adapter


class AdapterCollector(Collector):
    """What the store holds. Registered last: counts are told once more before they go."""

    def __init__(self, store: AdapterStore, counts: AdapterCounts) -> None:
        self._store = store
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """The store as it is now."""
        held = self._store.snapshot()
        gauges = {
            "infmoe_adapters": ("Adapters that are known by name", held.names),
            "infmoe_adapters_resident": ("Versions of adapters in memory", held.resident),
            "infmoe_adapters_pinned": ("Versions that stay in memory", held.pinned),
            "infmoe_adapter_memory_bytes": ("Bytes of adapters in memory", held.used_bytes),
            "infmoe_adapter_limit_bytes": ("Bytes that adapters may take", held.limit_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        counts = {
            "infmoe_adapter_loads": ("Versions read into memory", held.loads),
            "infmoe_adapter_failures": ("Versions that could not be read", held.failures),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(name, text, value=value)
        self._counts.keep(self._is_resident)

    def _is_resident(self, name: str) -> bool:
        try:
            return self._store.tell_current(name).state in ("resident", "pinned")
        except RequestError:  # it is gone altogether
            return False
