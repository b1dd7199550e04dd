"""What was used since the start, by key and adapter; bounded, whoever calls."""

import time
from dataclasses import asdict, dataclass, field

from fastapi import FastAPI, Request

from server.responses import ERRORS

MAX_ROWS = 10_000
OTHER = "(other)"  # no key and no adapter is called so


@dataclass(slots=True)
class Row:
    """Counts of one key with one adapter."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass(slots=True)
class Usage:
    """The counts; beyond `MAX_ROWS` pairs, new ones are counted together."""

    since: int = field(default_factory=lambda: int(time.time()))
    rows: dict[tuple[str, str | None], Row] = field(default_factory=dict)

    def add(
        self, key: str, adapter: str | None, prompt_tokens: int, completion_tokens: int
    ) -> None:
        """Count one request."""
        row = self._row(key, adapter)
        row.requests += 1
        row.prompt_tokens += prompt_tokens
        row.completion_tokens += completion_tokens

    def add_late(self, key: str, adapter: str | None, completion_tokens: int) -> None:
        """Count tokens that came after their request was counted."""
        self._row(key, adapter).completion_tokens += completion_tokens

    def _row(self, key: str, adapter: str | None) -> Row:
        pair = (key, adapter)
        if pair not in self.rows and len(self.rows) >= MAX_ROWS:
            pair = (OTHER, OTHER)
        return self.rows.setdefault(pair, Row())

    def report(self, key: str | None = None) -> dict[str, object]:
        """All rows, or those of a key, in JSON's types."""
        rows = [
            {"key": name, "adapter": adapter, **asdict(row)}
            for (name, adapter), row in sorted(self.rows.items(), key=lambda item: str(item[0]))
            if key is None or name == key
        ]
        return {"object": "usage", "since": self.since, "data": rows}


def add_usage_routes(app: FastAPI, usage: Usage) -> None:
    """Serve /admin/usage, and /v1/usage to each key for itself."""

    @app.get("/admin/usage", responses=ERRORS)
    async def read_usage() -> dict[str, object]:
        """Requests and tokens of all keys by adapter, since the start of the server."""
        return usage.report()

    @app.get("/v1/usage", responses=ERRORS)
    async def read_own_usage(request: Request) -> dict[str, object]:
        """Requests and tokens of the key that asks."""
        return usage.report(request.scope["state"]["caller"].name)
