"""GET /v1/info: what is served, within which limits, by which plan of memory."""

import platform
from dataclasses import asdict

from fastapi import FastAPI

from engine.adapter_store import AdapterStore
from server.health import require_ready
from server.protocol import Engine, ExpertStats
from server.responses import ERRORS
from server.settings import Settings
from server.versions import installed_version


def describe(
    engine: Engine, settings: Settings, store: AdapterStore | None = None
) -> dict[str, object]:
    """Facts of an engine that is ready, in JSON's types."""
    plan, stats = engine.plan, engine.stats()
    return {
        "version": installed_version(),
        "versions": {
            "infmoe": installed_version(),
            "python": platform.python_version(),
            "torch": installed_version("torch"),
        },
        "model": {"id": engine.model_name, **asdict(engine.config)},
        "limits": tell_limits(engine, settings),
        "queue": {
            "waiting": stats.queued,
            "waiting_tokens": stats.queued_tokens,
            "running": stats.running,
            "max_rows": stats.max_rows,
        },
        "encoder_cache": {
            "limit_bytes": settings.encoder_cache,
            "used_bytes": stats.encoder_cache.nbytes,
            "hits": stats.encoder_cache.hits,
            "partial_hits": stats.encoder_cache.partial_hits,
            "hit_tokens": stats.encoder_cache.hit_tokens,
            "misses": stats.encoder_cache.misses,
        },
        "is_batch_invariant": settings.invariant,
        "plan": None if plan is None else dict(plan.facts()),
        "experts": _expert_counts(stats.experts),
        "adapters": None if store is None else tell_adapters(store),
        "fallbacks": list(engine.fallbacks),
    }


def tell_limits(engine: Engine, settings: Settings) -> dict[str, object]:
    """What a request may ask for before it is refused."""
    longest = engine.config.max_prompt_tokens
    return {
        "max_prompt_tokens": longest,
        "max_tokens": longest,
        "max_rows": settings.max_rows,
        "max_queue": settings.max_queue,
        "max_queue_tokens": settings.max_queue_tokens,
        "max_choices": settings.choices_limit,
        "max_prompt_chars": settings.max_prompt_chars,
        "max_body_bytes": settings.max_body_bytes,
        "max_upload_bytes": settings.max_upload_bytes,
        "request_timeout_s": settings.request_timeout_s,
    }


def tell_adapters(store: AdapterStore) -> dict[str, object]:
    """Totals of the adapters; /v1/models lists them."""
    return asdict(store.snapshot())


def _expert_counts(stats: ExpertStats | None) -> dict[str, float] | None:
    """Counts of offloaded experts since the start; None where all are resident."""
    if stats is None:
        return None
    return {
        "hits": stats.hits,
        "misses": stats.misses,
        "hit_rate": stats.hits / max(stats.hits + stats.misses, 1),
        "host_loads": stats.host_loads,
        "evictions": stats.evictions,
        "read_bytes": stats.read_bytes,
        "copied_bytes": stats.copied_bytes,
        "stall_s": stats.stall_s,
        "prefetched": stats.prefetched,
        "prefetch_used": stats.prefetch_used,
        "prefetch_wasted": stats.prefetch_wasted,
    }


def add_info_route(
    app: FastAPI, engine: Engine, settings: Settings, store: AdapterStore | None = None
) -> None:
    """Serve /v1/info; 503 until the model is loaded."""

    @app.get("/v1/info", responses=ERRORS)
    async def read_info() -> dict[str, object]:
        """Model, limits, queue, plan of memory, experts, adapters, and slower ways."""
        require_ready(engine)
        return describe(engine, settings, store)
