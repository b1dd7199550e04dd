"""GET /v1/info: what is served, within which limits, by which plan of memory."""

from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from fastapi import FastAPI

from engine.config import LENGTH_FACTOR
from server.health import require_ready
from server.models import ERRORS
from server.protocol import Engine, ExpertStats
from server.settings import Settings

UNKNOWN = "unknown"


def installed_version(package: str = "infmoe") -> str:
    """The version of the installed package; 'unknown' where the source runs without one."""
    try:
        return version(package)
    except PackageNotFoundError:
        return UNKNOWN


def describe(engine: Engine, settings: Settings) -> dict[str, object]:
    """Facts of an engine that is ready, in JSON's types."""
    config, plan = engine.config, engine.plan
    longest = config.max_positions * LENGTH_FACTOR
    return {
        "version": installed_version(),
        "model": {"id": engine.model_name, **asdict(config)},
        "limits": {
            "max_prompt_tokens": longest,
            "max_tokens": longest,
            "max_queue": settings.max_queue,
            "max_choices": settings.choices_limit,
            "max_body_bytes": settings.max_body_bytes,
        },
        "plan": None if plan is None else dict(plan.facts()),
        "experts": _expert_counts(engine.stats().experts),
        "fallbacks": list(engine.fallbacks),
    }


def _expert_counts(stats: ExpertStats | None) -> dict[str, float] | None:
    """Counts of offloaded experts since the start; None where all are resident."""
    if stats is None:
        return None
    return {
        "hits": stats.hits,
        "misses": stats.misses,
        "host_loads": stats.host_loads,
        "evictions": stats.evictions,
        "read_bytes": stats.read_bytes,
        "copied_bytes": stats.copied_bytes,
        "stall_s": stats.stall_s,
        "prefetched": stats.prefetched,
        "prefetch_used": stats.prefetch_used,
        "prefetch_wasted": stats.prefetch_wasted,
    }


def add_info_route(app: FastAPI, engine: Engine, settings: Settings) -> None:
    """Serve /v1/info; 503 until the model is loaded."""

    @app.get("/v1/info", responses=ERRORS)
    async def read_info() -> dict[str, object]:
        """Model, limits, plan of memory, expert counts, and what works in a slower way."""
        require_ready(engine)
        return describe(engine, settings)
