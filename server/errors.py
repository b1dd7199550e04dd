"""Failures as the object that OpenAI clients read: {"error": {message, type, param, code}}."""

import logging
import math
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from engine.errors import (
    CheckpointError,
    ConfigError,
    EngineError,
    EngineStopped,
    Overloaded,
    PromptTooLong,
    RequestError,
    TokenizerError,
)
from server.safe_headers import SAFE_HEADERS

logger = logging.getLogger(__name__)

# HTTP status and error code of each error of the engine; a test asserts that none is missing.
STATUS: dict[type[EngineError], tuple[int, str]] = {
    EngineError: (500, "internal_error"),
    ConfigError: (500, "internal_error"),
    CheckpointError: (500, "internal_error"),
    TokenizerError: (500, "internal_error"),
    RequestError: (400, "invalid_value"),
    PromptTooLong: (400, "context_length_exceeded"),
    Overloaded: (429, "server_overloaded"),
    EngineStopped: (503, "engine_stopped"),
}
ROUTER_ERRORS = {
    400: ("invalid_json", "the body cannot be read as JSON in UTF-8"),
    404: ("not_found", "no such path; /openapi.json lists what there is"),
    405: ("method_not_allowed", "this path does not take this method"),
    408: ("request_timeout", "the body did not arrive in time"),
    413: ("body_too_large", "the body is too large"),
}
CLIENT_GONE = 499  # nobody reads it; the log and the metrics do
MAX_RETRY_AFTER_S = 60.0  # clients of OpenAI give up at once when told to wait for longer


class ApiError(Exception):
    """A failure with all that its reply needs; `message` is shown to the client."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
        limit: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.param = param
        self.headers = dict(headers or {})
        self.limit = limit  # which of a key's limits it is about

    def note(self, notes: dict[str, object]) -> None:
        """Leave word for the log and the metrics."""
        notes["error"] = self.code
        if self.limit is not None:
            notes["limit"] = self.limit

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON object of the reply."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> JSONResponse:
        """The whole reply."""
        return JSONResponse(self.body(), self.status, self.headers)


def retry_headers(wait_s: float) -> dict[str, str]:
    """Headers that ask a client to come back after `wait_s`, in both spellings."""
    wait_s = min(max(wait_s, 0.001), MAX_RETRY_AFTER_S)
    return {"retry-after": str(math.ceil(wait_s)), "retry-after-ms": str(math.ceil(wait_s * 1000))}


def api_error(error: Exception) -> ApiError:
    """Translate any failure; what is not known to be safe to show becomes a plain 500."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineError):
        return from_engine(error)
    if isinstance(error, RequestValidationError):
        return from_validation(error)
    if isinstance(error, HTTPException):
        default = ("http_error", str(error.detail))
        code, message = ROUTER_ERRORS.get(error.status_code, default)
        return ApiError(error.status_code, message, code=code, headers=error.headers)
    return ApiError(500, "internal error; the server log has details", code="internal_error")


def from_engine(error: EngineError) -> ApiError:
    """Translate an error of the engine by the table."""
    status, code = STATUS[type(error)]
    message, param = str(error), None
    headers: dict[str, str] = {}
    if isinstance(error, RequestError):
        param = error.field
    elif isinstance(error, Overloaded):
        headers = retry_headers(error.retry_after_s)
    elif isinstance(error, EngineStopped):
        message, headers = "the engine is stopping or has failed", retry_headers(5.0)
    else:  # may name files or sizes of the host
        message = "internal error; the server log has details"
    return ApiError(status, message, code=code, param=param, headers=headers)


def from_validation(error: RequestValidationError) -> ApiError:
    """Translate the first finding of pydantic; nothing of the input is shown."""
    first: dict[str, Any] = error.errors()[0]
    if first["type"] == "json_invalid":
        where = first["loc"][-1]
        message = f"the body is not valid JSON at character {where}: {first['ctx']['error']}"
        return ApiError(400, message, code="invalid_json")
    path = [str(part) for part in first["loc"][1:]]
    if not path and first["type"] == "value_error":  # of the whole body
        reason = first["msg"].removeprefix("Value error, ")
        return ApiError(400, reason, code="invalid_value")
    if not path:
        return ApiError(400, "the body must be a JSON object in valid Unicode", code="invalid_json")
    reason = first["msg"].removeprefix("Value error, ")
    param = ".".join(path)[:200].encode(errors="replace").decode()  # may hold half characters
    return ApiError(400, f"{param}: {reason}", code="invalid_value", param=param)


async def on_error(request: Request, error: Exception) -> Response:
    """Answer a failure that left a route; the log line of the request tells its code."""
    problem = api_error(error)
    state = request.scope.get("state", {})
    request_id = state.get("request_id", "")
    problem.note(state.get("notes", {}))
    if problem.status == 500:  # the client is not told, so the log must be
        logger.error("id=%s %s: %s", request_id, type(error).__name__, error)
    response = problem.response()
    # Of a bug no layer sees the reply; the others would add the same.
    response.headers.update({"x-request-id": request_id, **SAFE_HEADERS})
    return response


async def refuse(problem: ApiError, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer a request that no route gets to see."""
    problem.note(scope["state"]["notes"])
    await problem.response()(scope, receive, send)


async def on_client_gone(_request: Request, _error: Exception) -> Response:
    """End a request whose client went away before the reply."""
    return Response(status_code=CLIENT_GONE)


def install_handlers(app: FastAPI) -> None:
    """Make `on_error` answer whatever a route or the router raises."""
    for kind in (ApiError, EngineError, RequestValidationError, HTTPException, Exception):
        app.add_exception_handler(kind, on_error)
    app.add_exception_handler(ClientDisconnect, on_client_gone)
