"""Event streams of the engine: joined into one, raced against the client, sent as SSE."""

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from engine.request import Event
from server.protocol import EventStream

logger = logging.getLogger(__name__)

T = TypeVar("T")

PING = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def data_frame(json_text: str) -> bytes:
    """One event; JSON escapes line breaks, so that its text is always one line."""
    return f"data: {json_text}\n\n".encode()


class Merge:
    """Several event streams as one queue of (index, event).

    Use as an async context: leaving it, for whatever reason, closes all streams. The queue has no
    bound of its own; it holds at most the tokens that the requests may generate.
    """

    def __init__(self, streams: Sequence[EventStream]) -> None:
        self._streams = streams
        self._queue: asyncio.Queue[tuple[int, Event | None]] = asyncio.Queue()
        self._pumps: list[asyncio.Task[None]] = []
        self._num_open = len(streams)
        self._num_waiting = 0

    async def __aenter__(self) -> Self:
        self._pumps = [asyncio.create_task(self._pump(i, s)) for i, s in enumerate(self._streams)]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await cancel_all(self._pumps)
        for stream in self._streams:
            await stream.aclose()

    async def _pump(self, index: int, stream: EventStream) -> None:
        try:
            async for event in stream:
                self._queue.put_nowait((index, event))
                self._num_waiting += 1
        finally:
            self._queue.put_nowait((index, None))

    def has_waiting(self) -> bool:
        """Whether the next event is there already."""
        return self._num_waiting > 0

    async def events(self, ping_s: float | None = None) -> AsyncIterator[tuple[int, Event] | None]:
        """All events as they come; None whenever `ping_s` pass without one.

        Raises what a stream raises.
        """
        while self._num_open:
            try:
                async with asyncio.timeout(ping_s):
                    index, event = await self._queue.get()
            except TimeoutError:
                yield None
                continue
            if event is not None:
                self._num_waiting -= 1
                yield index, event
                continue
            self._num_open -= 1
            await self._pumps[index]


async def cancel_all(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel tasks and wait until they are gone; what they raise is of no more interest."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def until_disconnect(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Result of `work`, which is cancelled when the client goes away.

    Polling for the disconnect misses it under some middleware; a pending receive() never does.

    Raises:
        ClientDisconnect: the client went away first.
    """

    async def wait_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    task, gone = asyncio.create_task(work), asyncio.create_task(wait_gone())
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        await cancel_all((task, gone))


class SseResponse(Response):
    """Sends frames as server-sent events until they end or the client goes; closes the streams."""

    media_type = "text/event-stream"

    def __init__(self, merge: Merge, frames: AsyncIterator[bytes], headers: dict[str, str]) -> None:
        self._merge = merge
        self._frames = frames
        self.background = None
        self.status_code = 200
        unbuffered = {"cache-control": "no-cache", "x-accel-buffering": "no"}  # for proxies
        self.init_headers({**unbuffered, **headers})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with self._merge:
            try:
                await until_disconnect(receive, self._send(send))
            except ClientDisconnect:
                logger.debug("client gone id=%s", scope["state"]["request_id"])

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": self.status_code}
        await send({**head, "headers": self.raw_headers})
        async for frame in self._frames:
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
