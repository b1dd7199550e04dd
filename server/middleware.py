"""The outermost layer around the routes: request ids, log lines and metrics. Pure ASGI."""

import logging
import re
import time
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import CLIENT_GONE
from server.metrics import Metrics

logger = logging.getLogger(__name__)

SAFE_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
QUIET_ROUTES = ("/health", "/v2/health", "/metrics")  # probes; they would drown the log


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
        if (meter := scope["state"].get("meter")) is not None:
            meter.close()
            for name, value in meter.account().items():  # the route may not have got so far
                notes.setdefault(name, value)
        self.metrics.record(route, status, wait_s, notes)
        level = logging.DEBUG if route.startswith(QUIET_ROUTES) else logging.INFO
        details = "".join(f" {name}={value}" for name, value in notes.items())
        request_id = scope["state"]["request_id"]
        method, wait_ms = scope["method"], round(wait_s * 1000, 1)
        text = "%s %s %d ms=%.1f id=%s%s"
        facts = {"method": method, "route": route, "status": status, "ms": wait_ms}
        fields = {"request_id": request_id, **facts, **notes}
        more = {"short": f"{method} {route} {status}", "fields": fields}
        logger.log(level, text, method, route, status, wait_ms, request_id, details, extra=more)
