"""Is the process alive, can it take work, and if not yet: how far has it come."""

import asyncio
import json
from collections.abc import AsyncIterator

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

from engine.errors import EngineStopped
from server.errors import ApiError, retry_headers
from server.protocol import Engine

RETRY_S = 5.0
LOADING = ("starting", "loading")
LOOK_S = 0.2  # how often the events look for progress

UNREADY: dict[int | str, dict[str, object]] = {503: {"description": "Loading, draining or failed"}}
STREAM: dict[int | str, dict[str, object]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}
}


def require_ready(engine: Engine) -> None:
    """Raise ApiError (503) unless the engine takes requests."""
    state = engine.state
    if state == "ready":
        return
    if state == "failed":  # no second try can help before a restart
        message, headers = "the engine has failed", {"x-should-retry": "false"}
        raise ApiError(503, message, code="engine_failed", headers=headers)
    if state in ("draining", "stopped"):
        message, code = "the server is shutting down", "shutting_down"
    else:
        message, code = f"the model is not loaded yet: {engine.phase}", "model_loading"
    raise ApiError(503, message, code=code, headers=retry_headers(RETRY_S))


def has_started(engine: Engine) -> bool:
    """Whether the model has been loaded, whatever came of it later."""
    if engine.state in LOADING:
        return False
    try:
        return engine.config is not None
    except EngineStopped:  # drained or failed before
        return False


def describe_start(engine: Engine) -> dict[str, object]:
    """How far loading has come; the estimate is None until there is a rate."""
    progress, eta_s = engine.progress, engine.progress.eta_s()
    facts: dict[str, object] = {
        "status": engine.state,
        "phase": engine.phase,
        "read_bytes": progress.read_bytes,
        "total_bytes": progress.total_bytes,
    }
    if has_started(engine):
        return facts
    return {
        **facts,
        "elapsed_s": round(progress.elapsed_s(), 3),
        "eta_s": None if eta_s is None else round(eta_s, 3),
        "idle_s": round(progress.idle_s(), 3),
    }


async def follow_start(engine: Engine, keep_alive_s: float) -> AsyncIterator[bytes]:
    """Server-sent events: one for each step of progress, the last one when loading has ended."""
    clock = asyncio.get_running_loop().time
    told: object = None
    told_s = clock()
    while True:
        facts = describe_start(engine)
        news = (facts["status"], facts["phase"], facts["read_bytes"])
        if news != told:
            yield f"data: {json.dumps(facts)}\n\n".encode()
            told, told_s = news, clock()
        elif clock() - told_s >= keep_alive_s:
            yield b": keep-alive\n\n"
            told_s = clock()
        if facts["status"] not in LOADING:
            return
        await asyncio.sleep(LOOK_S)


def add_health_routes(app: FastAPI, engine: Engine, keep_alive_s: float = 12.0) -> None:
    """Serve the probes; none of them waits for the engine."""
    _add_live(app)
    _add_ready(app, engine)
    _add_startup(app, engine, keep_alive_s)


def _add_live(app: FastAPI) -> None:
    @app.head("/health/live", include_in_schema=False)  # load balancers ask so
    @app.head("/v2/health/live", include_in_schema=False)
    @app.get("/health/live")
    @app.get("/v2/health/live")
    async def read_live() -> dict[str, object]:
        """The process answers; it may still be loading."""
        return {"status": "live", "live": True}


def _add_ready(app: FastAPI, engine: Engine) -> None:
    @app.head("/health", include_in_schema=False)
    @app.head("/health/ready", include_in_schema=False)
    @app.head("/v2/health/ready", include_in_schema=False)
    @app.get("/health", responses=UNREADY)  # where benchmark clients look
    @app.get("/health/ready", responses=UNREADY)
    @app.get("/v2/health/ready", responses=UNREADY)
    async def read_ready() -> JSONResponse:
        """The model is loaded and requests are accepted."""
        is_ready = engine.state == "ready"
        body = {"status": engine.state, "phase": engine.phase, "ready": is_ready}
        if is_ready:
            return JSONResponse(body)
        return JSONResponse(body, 503, retry_headers(RETRY_S))


def _add_startup(app: FastAPI, engine: Engine, keep_alive_s: float) -> None:
    @app.head("/health/startup", include_in_schema=False)
    @app.get("/health/startup", responses=UNREADY)
    async def read_startup() -> JSONResponse:
        """The model has been loaded once; until then how far loading has come."""
        facts = describe_start(engine)
        if has_started(engine):
            return JSONResponse(facts)
        eta_s = engine.progress.eta_s()
        return JSONResponse(facts, 503, retry_headers(RETRY_S if eta_s is None else eta_s))

    @app.get("/health/startup/events", response_class=StreamingResponse, responses=STREAM)
    async def follow_startup() -> StreamingResponse:
        """The same as server-sent events, which end when loading has."""
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        frames = follow_start(engine, keep_alive_s)
        return StreamingResponse(frames, media_type="text/event-stream", headers=headers)

    @app.head("/health/startup/events", include_in_schema=False)
    async def tell_that_events_are_there() -> Response:  # and does not wait for their end
        return Response(media_type="text/event-stream")
