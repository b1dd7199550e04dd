"""A small HTTP client for measuring: server-sent events as they come, connections kept or not.

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

    def head(self, method: str, path: str, size: int, *, is_kept: bool) -> bytes:
        """The lines before the body."""
        key = f"authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        close = "" if is_kept else "connection: close\r\n"
        return (
            f"{method} {path} HTTP/1.1\r\nhost: {self.host}\r\n{close}{key}"
            f"content-type: application/json\r\ncontent-length: {size}\r\n\r\n"
        ).encode()


class Client:
    """Asks a server one thing after another; with `is_kept` by one connection, as those of OpenAI.

    Use it with `aclosing`.
    """

    def __init__(self, target: Target, *, is_kept: bool = True) -> None:
        self._target = target
        self._is_kept = is_kept
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def aclose(self) -> None:
        """Hang up."""
        if self._streams is not None:
            writer, self._streams = self._streams[1], None
            writer.close()
            with suppress(OSError):
                await writer.wait_closed()

    async def complete(self, body: dict[str, object]) -> Trial:
        """Ask for a completion and note when its tokens come; `stream` or not, as it says."""
        data = json.dumps({**body, "return_token_ids": True}).encode()
        trial, began = Trial(), perf_counter()
        try:
            async with aclosing(self._lines("POST", "/v1/completions", data)) as lines:
                async for line in lines:
                    _note(trial, line, perf_counter() - began)
        except (OSError, EngineError, asyncio.IncompleteReadError) as error:
            trial.error = str(error) or type(error).__name__
        trial.end_s = perf_counter() - began
        if not trial.error and not trial.token_s:
            trial.error = "the reply ended without a token"
        return trial

    async def read(self, path: str) -> bytes:
        """What there is at a path. Raises EngineError, OSError or IncompleteReadError."""
        async with aclosing(self._lines("GET", path, b"")) as lines:
            return b"\n".join([line async for line in lines])

    async def _lines(self, method: str, path: str, data: bytes) -> AsyncGenerator[bytes]:
        """Lines of the body of a reply, without empty ones. Raises EngineError for a failure."""
        is_whole = False
        try:
            reader, writer = await self._connect()
            head = self._target.head(method, path, len(data), is_kept=self._is_kept)
            writer.write(head + data)
            await writer.drain()
            held = b""
            async for chunk in _chunks(reader):
                *lines, held = (held + chunk).split(b"\n")
                for line in lines:
                    if line:
                        yield line
            is_whole = True
            if held:
                yield held
        finally:
            if not (is_whole and self._is_kept):
                await self.aclose()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None or self._streams[0].at_eof():
            await self.aclose()
            host, port = self._target.host, self._target.port
            self._streams = await asyncio.open_connection(host, port, limit=2**24)
        return self._streams


async def complete(target: Target, body: dict[str, object]) -> Trial:
    """As `Client.complete`, by a connection of its own."""
    async with aclosing(Client(target, is_kept=False)) as client:
        return await client.complete(body)


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The body of a reply as it comes. Raises EngineError unless it is a good one."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    status = int(head.split(None, 2)[1])
    if status != 200:
        raise EngineError(f"status {status}")
    if "transfer-encoding: chunked" not in head:
        length = head.partition("content-length:")[2].partition("\r\n")[0]
        yield await reader.readexactly(int(length))
        return
    while size := int((await reader.readuntil(b"\r\n")).strip(), 16):
        yield (await reader.readexactly(size + 2))[:-2]
    await reader.readuntil(b"\r\n")


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
