"""Is the process alive, can it take work, and if not yet: how far has it come."""

from fastapi import FastAPI
from fastapi.responses import JSONResponse

from server.errors import ApiError, retry_headers
from server.protocol import Engine

RETRY_S = 5.0


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


def add_health_routes(app: FastAPI, engine: Engine) -> None:
    """Serve /health, /health/live and /health/ready; none of them waits for the engine."""

    @app.head("/health", include_in_schema=False)  # load balancers ask so
    @app.head("/health/live", include_in_schema=False)
    @app.get("/health")
    @app.get("/health/live")
    async def read_live() -> dict[str, str]:
        """The process answers; it may still be loading."""
        return {"status": "live"}

    @app.head("/health/ready", include_in_schema=False)
    @app.get("/health/ready", responses={503: {"description": "Loading, draining or failed"}})
    async def read_ready() -> JSONResponse:
        """The model is loaded and requests are accepted."""
        state = engine.state
        body = {"status": state, "phase": engine.phase}
        if state == "ready":
            return JSONResponse(body)
        return JSONResponse(body, 503, retry_headers(RETRY_S))
