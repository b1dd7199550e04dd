"""The layer that takes in bodies: JSON only, none too large, too slow or too deep."""

import asyncio
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import anyio
from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from server.errors import ApiError, refuse, retry_headers

BODY_METHODS = ("POST", "PUT", "PATCH")
UPLOADS = "/admin/"  # below it files come as they are
BUSY_S = 1.0  # nobody knows when the others end
MAX_DEPTH = 64
# A body of 4 MB that is all "[],[],..." took 0.7 s of the event loop to parse, most of it to look
# for garbage among 1.3 million lists; so many values take less than 0.1 s, whatever they are.
MAX_VALUES = 2**17
SMALL_BYTES = 2**16  # checked in less than 1 ms
OPENINGS = frozenset(b"[{")
CLOSINGS = frozenset(b"]}")
# A string, also one without its end, or a bracket. Possessive: linear, whatever comes.
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)


def check_json(body: bytes) -> None:
    """Refuse JSON that would take long to parse. Raises ApiError (400)."""
    num_open = body.count(b"[") + body.count(b"{")
    if num_open + body.count(b",") > MAX_VALUES:  # of a text too, that has so many of them
        text = f"the body has more than {MAX_VALUES} values; send fewer prompts at a time"
        raise ApiError(400, text, code="invalid_value")
    if num_open > MAX_DEPTH and depth_exceeds(body, MAX_DEPTH):
        text = f"the body is nested more than {MAX_DEPTH} levels deep"
        raise ApiError(400, text, code="invalid_json")


def depth_exceeds(body: bytes, limit: int) -> bool:
    """Whether lists and objects are nested more than `limit` levels deep; '[[1]]' is 2 deep."""
    depth = 0
    for match in TOKEN.finditer(body):
        first = body[match.start()]
        if first in OPENINGS:
            depth += 1
            if depth > limit:
                return True
        elif first in CLOSINGS:
            depth -= 1
    return False


class BodyRoom:
    """Bounds the bytes of all bodies in memory together, each to the end of its request."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """What takes so many bytes more, or raises ApiError (429); at the end all are free again.

        They are taken as they come: who declares many and sends none holds none.
        """
        taken = 0

        def take(num_bytes: int) -> None:
            nonlocal taken
            if self.used + num_bytes > self.limit:
                text = f"bodies of other requests fill the {self.limit} bytes that all may take"
                headers = {"connection": "close", **retry_headers(BUSY_S)}
                raise ApiError(429, text, code="server_overloaded", headers=headers)
            self.used += num_bytes
            taken += num_bytes

        try:
            yield take
        finally:
            self.used -= taken


class BodyGuard:
    """Takes in whole bodies of JSON and hands them on; lets uploads pass within their bounds."""

    def __init__(
        self,
        app: ASGIApp,
        max_body_bytes: int,
        max_upload_bytes: int,
        timeout_s: float,
        room: BodyRoom,
    ) -> None:
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.max_upload_bytes = max_upload_bytes
        self.timeout_s = timeout_s
        self.room = room

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in BODY_METHODS:
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        with self.room.share() as take:
            try:
                if may_upload(scope, headers):
                    check_length(headers, self.max_upload_bytes)
                    receive = self._bounded(receive)
                else:
                    check_length(headers, self.max_body_bytes)
                    require_json(headers)
                    body = await self._read(receive, take)
                    if body is None:
                        return  # the client is gone
                    scope["state"]["body_bytes"] = len(body)
                    receive = replay(body, receive)
            except ApiError as problem:
                await refuse(problem, scope, receive, send)
                return
            await self.app(scope, receive, send)

    async def _read(self, receive: Receive, take: Callable[[int], None]) -> bytes | None:
        """The body; None if the client went away. Raises ApiError (400, 408, 413, 429)."""
        body = bytearray()
        try:
            async with asyncio.timeout(self.timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    take(len(part))
                    body += part
                    if len(body) > self.max_body_bytes:  # no Content-Length, or a false one
                        raise too_large(self.max_body_bytes)
                    if not message.get("more_body", False):
                        break
        except TimeoutError as error:
            text = f"the body did not arrive within {self.timeout_s:g} s"
            headers = {"connection": "close", "x-should-retry": "false"}
            raise ApiError(408, text, code="request_timeout", headers=headers) from error
        whole = bytes(body)
        if len(whole) > SMALL_BYTES:
            await anyio.to_thread.run_sync(check_json, whole)
        else:
            check_json(whole)
        return whole

    def _bounded(self, receive: Receive) -> Receive:
        """Pieces of an upload, each of which must come in time, and all within the limit."""
        num_bytes = 0
        is_whole = False  # then it is the client's going that is awaited, however long

        async def bounded() -> Message:
            nonlocal num_bytes, is_whole
            try:
                async with asyncio.timeout(None if is_whole else self.timeout_s):
                    message = await receive()
            except TimeoutError as error:
                raise HTTPException(408) from error  # of this class alone FastAPI lets one pass
            num_bytes += len(message.get("body", b""))
            if num_bytes > self.max_upload_bytes:
                raise HTTPException(413)
            is_whole = not message.get("more_body", False)
            return message

        return bounded


def may_upload(scope: Scope, headers: Headers) -> bool:
    """Whether a body need not be JSON: files, or none at all, where a key guards the path."""
    path: str = scope["path"]
    return path.startswith(UPLOADS) and media_type(headers) != "application/json"


def media_type(headers: Headers) -> str:
    """The declared type of the body, without its parameters."""
    return headers.get("content-type", "").partition(";")[0].strip().lower()


def check_length(headers: Headers, limit: int) -> None:
    """Raise ApiError (413) if the declared length is over the limit."""
    length = headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limit:
        raise too_large(limit)


def require_json(headers: Headers) -> None:
    """Raise ApiError (415) unless the body is declared as JSON: no form of a foreign page can."""
    if media_type(headers) != "application/json":
        text = "the content type must be application/json"
        raise ApiError(415, text, code="unsupported_content_type")


def too_large(limit: int) -> ApiError:
    """An error that names the limit."""
    text = f"the body is too large; the limit is {limit} bytes"
    return ApiError(413, text, code="body_too_large", headers={"connection": "close"})


def replay(body: bytes, receive: Receive) -> Receive:
    """A receive that hands out a body in one piece, then whatever comes."""
    is_read = False

    async def replayed() -> Message:
        nonlocal is_read
        if is_read:
            return await receive()
        is_read = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed
