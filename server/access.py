"""The layer that asks for keys: on every path but a short list, before anything else is read."""

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server import schemas_keys
from server.accounts import Accounts, Caller
from server.errors import CLIENT_GONE, ApiError, refuse

# What probes ask, which tells of no model and no caller. Compared with the path as the router
# compares it, never with an address rebuilt from headers.
PUBLIC = frozenset(
    {
        "/health",
        "/health/live",
        "/health/ready",
        "/health/startup",
        "/health/startup/events",
        "/v2/health/live",
        "/v2/health/ready",
    }
)
ANY_SCOPE = frozenset({"/v1/usage", "/docs", "/openapi.json"})
AREAS: dict[str, schemas_keys.Scope] = {
    "/admin": "admin",
    "/metrics": "metrics",
    "/v1/tune": "tune",
}


def scope_of(path: str) -> schemas_keys.Scope | None:
    """The scope that a path needs, known or not; None: any key will do."""
    if path in ANY_SCOPE:
        return None
    for area, scope in AREAS.items():
        if path == area or path.startswith(f"{area}/"):
            return scope
    return "infer"


def key_of(headers: Headers) -> str | None:
    """The key of a request; 'Bearer' with nothing after it is none."""
    kind, _, key = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and key.strip():
        return key.strip()
    return headers.get("x-api-key", "").strip() or None


class AccessGuard:
    """Finds out who calls, within which limits; the caller is at scope["state"]["caller"]."""

    def __init__(self, app: ASGIApp, accounts: Accounts) -> None:
        self.app = app
        self.accounts = accounts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":  # no route speaks it
            await receive()
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or scope["path"] in PUBLIC:
            await self.app(scope, receive, send)
            return
        caller = None
        try:
            caller = self.accounts.identify(key_of(Headers(scope=scope)))
            needed = scope_of(scope["path"])
            if needed is not None:
                caller.require_scope(needed)
            caller.enter()
        except ApiError as problem:
            if caller is not None:
                problem.headers.update(caller.headers())
            await refuse(problem, scope, receive, send)
            return
        scope["state"]["caller"] = caller
        scope["state"]["notes"]["key"] = caller.name
        await self._serve(caller, scope, receive, send)

    async def _serve(self, caller: Caller, scope: Scope, receive: Receive, send: Send) -> None:
        status = CLIENT_GONE  # until a whole reply has been sent
        sent_status = 500

        async def watched(message: Message) -> None:
            nonlocal status, sent_status
            if message["type"] == "http.response.start":
                sent_status = message["status"]
                MutableHeaders(scope=message).update(caller.headers())
            elif not message.get("more_body", False):
                status = sent_status
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except Exception:
            status = 500
            raise
        finally:
            caller.leave(status)
