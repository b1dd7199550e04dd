"""The outer layer: bounds of the request line and the headers, whose server it is, safe headers."""

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, refuse
from server.safe_headers import SAFE_HEADERS
from server.settings import Settings, is_loopback

MAX_URL_BYTES = 8192
MAX_QUERY_PARAMETERS = 100
MAX_HEADERS = 100  # h11 bounds their bytes


class EdgeGuard:
    """Refuses requests that no client of ours sends, and tells browsers to be strict."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.allowed_hosts = frozenset(host.lower() for host in settings.allowed_hosts)
        # Without keys the loopback address is the only guard, and a page whose name is made to
        # mean it (DNS rebinding) is past it; its name gives it away.
        self.checks_host = bool(self.allowed_hosts) or (
            not settings.has_keys and is_loopback(settings.host)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def safe(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SAFE_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        if problem := self._problem(scope):
            await refuse(problem, scope, receive, safe)
        else:
            await self.app(scope, receive, safe)

    def _problem(self, scope: Scope) -> ApiError | None:
        query: bytes = scope["query_string"]
        if len(scope["path"]) + len(query) > MAX_URL_BYTES:
            text = f"the address is longer than {MAX_URL_BYTES} bytes"
            return ApiError(414, text, code="address_too_long")
        if query.count(b"&") + query.count(b";") >= MAX_QUERY_PARAMETERS:
            text = f"the query has more than {MAX_QUERY_PARAMETERS} parameters"
            return ApiError(400, text, code="invalid_value")
        if len(scope["headers"]) > MAX_HEADERS:
            text = f"the request has more than {MAX_HEADERS} headers"
            return ApiError(431, text, code="too_many_headers")
        if self.checks_host and not self._is_ours(Headers(scope=scope).get("host", "")):
            text = "this server does not go by that name; the setting allowed_hosts lists more"
            return ApiError(421, text, code="host_not_allowed")
        return None

    def _is_ours(self, host: str) -> bool:
        try:
            name = (urlsplit(f"//{host}").hostname or "").rstrip(".")
        except ValueError:
            return False
        return name in self.allowed_hosts or is_local_name(name)


def is_local_name(name: str) -> bool:
    """Whether no foreign name server can have said what a name means: addresses, names in a house.

    127.0.0.1 and ::1, localhost, a.localhost, and names without a dot, as containers have.
    """
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return "." not in name or name.endswith(".localhost")
    return True
