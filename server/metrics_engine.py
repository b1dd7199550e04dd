"""Metrics that the engine keeps count of, read when Prometheus asks."""

from collections.abc import Iterator
from typing import get_args

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from server.protocol import Engine, EngineState


class LoadCollector(Collector):
    """What the engine is at, and how far the loading of its model has come."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """All as it is now."""
        state, progress = self._engine.state, self._engine.progress
        yield GaugeMetricFamily("infmoe_ready", "1 if requests are served", value=state == "ready")
        family = GaugeMetricFamily("infmoe_state", "1 for what the engine is at", labels=["state"])
        for known in get_args(EngineState):
            family.add_metric([known], state == known)
        yield family
        gauges = {
            "infmoe_load_read_bytes": ("Bytes of the model read so far", progress.read_bytes),
            "infmoe_load_size_bytes": ("Bytes of the model to be read", progress.total_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)


class WorkCollector(Collector):
    """What waits, what runs, and how much of it together."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """The load as it is now."""
        stats = self._engine.stats()
        gauges = {
            "infmoe_queue_depth": ("Requests waiting", stats.queued),
            "infmoe_queue_tokens": ("Tokens that those may take", stats.queued_tokens),
            "infmoe_running": ("Requests running", stats.running),
            "infmoe_rows_limit": ("Rows that may decode together now", stats.max_rows),
            "infmoe_stalled_seconds": ("How long the present step has gone on", stats.stalled_s),
            "infmoe_encoder_cache_bytes": ("Encoder outputs kept", stats.encoder_cache.nbytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        counts = {
            "infmoe_decode_steps": ("Steps of the decoder's batch", stats.work.steps),
            "infmoe_decode_rows": ("Rows of all steps: by steps, the batch", stats.work.rows),
            "infmoe_sweeps": ("Sweeps of the encoder", stats.work.sweeps),
            "infmoe_sweep_texts": ("Texts of all sweeps", stats.work.texts),
            "infmoe_sweep_tokens": ("Tokens of all sweeps", stats.work.tokens),
            "infmoe_encoder_cache_hits": ("Texts found encoded", stats.encoder_cache.hits),
            "infmoe_encoder_cache_partial_hits": (
                "Texts of which the beginning was found",
                stats.encoder_cache.partial_hits,
            ),
            "infmoe_encoder_cache_hit_tokens": (
                "Tokens of texts that were found, whole or in part",
                stats.encoder_cache.hit_tokens,
            ),
            "infmoe_encoder_cache_misses": ("Texts not found", stats.encoder_cache.misses),
        }
        for name, (text, value) in counts.items():
            yield CounterMetricFamily(name, text, value=value)


class ExpertCollector(Collector):
    """Counts of offloaded experts, which the engine keeps; nothing where all are resident."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
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

    def collect(self) -> Iterator[Metric]:
        """Both as they are now; the plan once there is one."""
        plan = self._engine.plan
        if plan is not None:
            text = "Bytes that the plan gives to each part"
            family = GaugeMetricFamily("infmoe_plan_bytes", text, labels=["part"])
            for part, size in plan.parts().items():
                family.add_metric([part.replace(" ", "_").lower()], size)
            yield family
            facts = plan.facts()
            yield by_tier("infmoe_planned_bytes", "Bytes planned for", facts["planned_bytes"])
            yield by_tier("infmoe_budget_bytes", "Bytes that may be used", facts["budget_bytes"])
        family = GaugeMetricFamily("infmoe_fallbacks", "1 for each slower way", labels=["what"])
        for fallback in dict.fromkeys(self._engine.fallbacks):
            family.add_metric([fallback], 1)
        yield family


def by_tier(name: str, text: str, sizes: object) -> GaugeMetricFamily:
    """Sizes of memories: host, gpu."""
    assert isinstance(sizes, dict)
    family = GaugeMetricFamily(name, f"{text}, by memory", labels=["tier"])
    for tier, size in sizes.items():
        family.add_metric([tier], size)
    return family
