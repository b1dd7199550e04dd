"""All layers between the log and the routes, in their order."""

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware

from server.access import AccessGuard
from server.accounts import Accounts
from server.bodies import BodyGuard, BodyRoom
from server.edge import EdgeGuard
from server.settings import Settings

TOLD_HEADERS = (
    *("x-request-id", "retry-after", "retry-after-ms", "x-should-retry", "x-ignored-fields"),
    "x-adapter",
    *(
        f"x-ratelimit-{what}-{unit}"
        for what in ("limit", "remaining", "reset")
        for unit in ("requests", "tokens")
    ),
)


def add_guards(app: FastAPI, settings: Settings, accounts: Accounts) -> None:
    """Put the layers around an application; the last one added is the outermost."""
    app.add_middleware(
        BodyGuard,
        max_body_bytes=settings.max_body_bytes,
        max_upload_bytes=settings.max_upload_bytes,
        timeout_s=settings.body_timeout_s,
        room=BodyRoom(settings.bodies_limit),
    )
    app.add_middleware(AccessGuard, accounts=accounts)
    if settings.cors_origins:  # outside of the keys: browsers ask before they send one
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "PUT", "PATCH", "DELETE"],
            allow_headers=[
                "*"
            ],  # of those origins only; clients of OpenAI send a dozen of their own
            expose_headers=list(TOLD_HEADERS),
        )
    app.add_middleware(EdgeGuard, settings=settings)
