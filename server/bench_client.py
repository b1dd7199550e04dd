"""A small HTTP client for measuring: one request per connection, server-sent events as they come.

It does as little as possible, so that its own work is not taken for the server's.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from time import perf_counter
from urllib.parse import urlsplit

from engine.errors import EngineError

DATA = b"data: "
LAST = b"[DONE]"


@dataclass(slots=True)
class Trial:
    """One request, as its client saw it. Times in seconds since it was sent.

    `token_s` holds the time at which each token came; `error` is empty where all went well.
    """

    token_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    error: str = ""

    @property
    def first_s(self) -> float:
        """Time to the first token."""
        return self.token_s[0]

    @property
    def between_s(self) -> float:
        """Mean time from one token to the next."""
        return (self.token_s[-1] - self.token_s[0]) / max(len(self.token_s) - 1, 1)


@dataclass(frozen=True, slots=True)
class Target:
    """Where to send requests. `api_key` goes along as a bearer token."""

    host: str
    port: int
    api_key: str = ""

    @classmethod
    def parse(cls, url: str, api_key: str = "") -> "Target":
        """From http://HOST:PORT. Raises EngineError if it is something else."""
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path not in ("", "/"):
            raise EngineError(f"--url is {url!r}; it must be like http://127.0.0.1:8000")
        return cls(parts.hostname, parts.port or 80, api_key)

    def head(self, method: str, path: str, size: int) -> bytes:
        """The lines before the body."""
        key = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        return (
            f"{method} {path} HTTP/1.1\r\nhost: {self.host}\r\nconnection: close\r\n{key}"
            f"content-type: application/json\r\ncontent-length: {size}\r\n\r\n"
        ).encode()


async def complete(target: Target, body: dict[str, object]) -> Trial:
    """Send a completions request and note when its tokens come; `stream` or not, as it says."""
    body = {**body, "return_token_ids": True}
    trial, began = Trial(), perf_counter()
    try:
        async with aclosing(_lines(target, "/v1/completions", body)) as lines:
            async for line in lines:
                now = perf_counter() - began
                _note(trial, line, now)
    except (OSError, EngineError, asyncio.IncompleteReadError) as error:
        trial.error = str(error) or type(error).__name__
    trial.end_s = perf_counter() - began
    if not trial.error and not trial.token_s:
        trial.error = "the reply ended without a token"
    return trial


def _note(trial: Trial, line: bytes, now: float) -> None:
    """Take in one line of a body: an event, or a whole reply."""
    text = line.removeprefix(DATA)
    if text == LAST or not text.startswith(b"{"):
        return
    message = json.loads(text)
    if "error" in message:
        trial.error = str(message["error"].get("code"))
        return
    for choice in message.get("choices", ()):  # an event may hold several tokens, or none
        trial.token_s += [now] * len(choice.get("token_ids") or ())


async def _lines(target: Target, path: str, body: dict[str, object]) -> AsyncGenerator[bytes]:
    """Lines of the body of a reply, without empty ones. Raises EngineError for a failure."""
    reader, writer = await asyncio.open_connection(target.host, target.port, limit=2**24)
    try:
        data = json.dumps(body).encode()
        writer.write(target.head("POST", path, len(data)) + data)
        await writer.drain()
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        status = int(head.split(None, 2)[1])
        if status != 200:
            raise EngineError(f"status {status}")
        chunks = _chunks(reader) if "transfer-encoding: chunked" in head else _rest(reader)
        held = b""
        async for chunk in chunks:
            *lines, held = (held + chunk).split(b"\n")
            for line in lines:
                if line:
                    yield line
        if held:
            yield held
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        yield (await reader.readexactly(size + 2))[:-2]


async def _rest(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    yield await reader.read()
