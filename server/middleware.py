"""Pure ASGI layers around the routes: body limits, request ids, log lines and metrics."""

import logging
import re
import time
import uuid

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import CLIENT_GONE, ApiError
from server.metrics import Metrics

logger = logging.getLogger(__name__)

BODY_METHODS = ("POST", "PUT", "PATCH")
SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
QUIET_ROUTES = ("/health", "/metrics")  # probes; they would drown the log


class BodyGuard:
    """Refuses bodies that are too large or not declared as JSON before they are read to the end."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
            await self.app(scope, receive, send)
            return
        if refusal := self._refusal(Headers(scope=scope)):
            scope["state"]["notes"]["error"] = refusal.code
            await refusal.response()(scope, receive, send)
            return
        num_bytes = 0

        async def limited() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_body_bytes:  # no Content-Length, or a false one
                raise HTTPException(413)  # of this class alone FastAPI lets one pass
            return message

        await self.app(scope, limited, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length[:20]) > self.max_body_bytes:
            text = f"the body is too large; the limit is {self.max_body_bytes} bytes"
            return ApiError(413, text, code="body_too_large")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            text = "the content type must be application/json"
            return ApiError(415, text, code="unsupported_content_type")
        return None


class RequestLog:
    """Gives each request an id, and at its end one log line and its metrics; no content."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start_s = time.monotonic()
        asked = Headers(scope=scope).get("x-request-id", "")
        request_id = asked if SAFE_ID.fullmatch(asked) else f"req-{uuid.uuid4().hex}"
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        notes: dict[str, object] = {}
        state["notes"] = notes  # what a route adds to the log line
        status = CLIENT_GONE  # until a whole reply has been sent
        sent_status = 500

        async def watched(message: Message) -> None:
            nonlocal status, sent_status
            if message["type"] == "http.response.start":
                sent_status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            elif not message.get("more_body", False):
                status = sent_status
            await send(message)

        self.metrics.in_flight.inc()
        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            self.metrics.in_flight.dec()
            self._record(scope, status, time.monotonic() - start_s, notes)

    def _record(self, scope: Scope, status: int, wait_s: float, notes: dict[str, object]) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self.metrics.requests.labels(route, str(status)).inc()
        self.metrics.latency.labels(route).observe(wait_s)
        level = logging.DEBUG if route.startswith(QUIET_ROUTES) else logging.INFO
        details = "".join(f" {name}={value}" for name, value in notes.items())
        request_id = scope["state"]["request_id"]
        text = "%s %s %d ms=%.1f id=%s%s"
        logger.log(level, text, scope["method"], route, status, wait_s * 1000, request_id, details)
