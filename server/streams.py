"""Event streams of the engine: joined into one, raced against the client, sent as SSE."""

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

from fastapi.responses import Response
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from engine.request import Event
from engine.ticket import ENDS
from server.protocol import EventStream

logger = logging.getLogger(__name__)

T = TypeVar("T")

PING = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def data_frame(json_text: str) -> bytes:
    """One event; JSON escapes line breaks, so that its text is always one line."""
    return f"data: {json_text}\n\n".encode()


class Merge:
    """Several event streams as one, in batches of (index, event): all that have come meanwhile.

    Use as an async context: leaving it, for whatever reason, closes all streams. What waits has no
    bound of its own; it is at most the tokens that the requests may generate. What streams that
    `count_late` still make then is counted, too.
    """

    def __init__(self, streams: Sequence[EventStream]) -> None:
        self._streams = streams
        self._arrived: list[tuple[int, Event]] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._num_open = len(streams)
        self._error: BaseException | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._count: Callable[[int, Event], object] | None = None

    def count_by(self, count: Callable[[int, Event], object]) -> None:
        """Have each event counted, also those that nobody gets to read as the client is gone.

        Some of these come later, when the reply is over: of the step under way when it went.
        """
        self._count = count

    async def __aenter__(self) -> Self:
        for index, stream in enumerate(self._streams):
            if (listen := getattr(stream, "listen", None)) is not None:
                listen(partial(self._take, index))  # a task would cost as much as all the rest
            else:
                pump = asyncio.create_task(self._pump(index, stream))
                pump.add_done_callback(self._end_pump)
                self._pumps.append(pump)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._pumps:
            await cancel_all(self._pumps)
        for index, stream in enumerate(self._streams):
            count_late = getattr(stream, "count_late", None)
            if self._count is not None and count_late is not None:
                count_late(partial(self._count, index))
            await stream.aclose()
        self._hand_out()

    def _take(self, index: int, event: Event) -> None:
        self._arrived.append((index, event))
        if isinstance(event, ENDS):
            self._num_open -= 1
        self._wake()

    async def _pump(self, index: int, stream: EventStream) -> None:
        async for event in stream:
            self._arrived.append((index, event))
            self._wake()

    def _end_pump(self, pump: asyncio.Task[None]) -> None:
        self._num_open -= 1
        if not pump.cancelled():
            self._error = self._error or pump.exception()
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _ring(self) -> None:
        self._timer = None
        self._wake()

    def _hand_out(self) -> list[tuple[int, Event]]:
        batch, self._arrived = self._arrived, []
        if self._count is not None:
            for index, event in batch:
                self._count(index, event)
        return batch

    async def batches(self, ping_s: float | None = None) -> AsyncIterator[list[tuple[int, Event]]]:
        """All events as they come; an empty batch whenever `ping_s` pass without one.

        Raises what a stream raises, after what had come before.
        """
        loop = asyncio.get_running_loop()
        due_s = loop.time() + ping_s if ping_s is not None else math.inf
        while True:
            if self._arrived:
                yield self._hand_out()
                if ping_s is not None:
                    due_s = loop.time() + ping_s
            elif self._error is not None:
                raise self._error
            elif not self._num_open:
                return
            elif loop.time() >= due_s:
                yield []
                due_s = loop.time() + (ping_s or 0.0)  # not those that a slow reader missed
            else:
                if self._timer is None and ping_s is not None:  # one for many events
                    self._timer = loop.call_at(due_s, self._ring)
                self._waiter = loop.create_future()
                await self._waiter


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
    task = asyncio.current_task()
    assert task is not None
    is_gone, is_over = False, False
    num_cancelling = task.cancelling()

    async def wait_gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    def cancel(watch: asyncio.Task[None]) -> None:
        nonlocal is_gone
        if is_over or watch.cancelled():
            return
        watch.exception()  # who cannot be heard is gone
        is_gone = True
        task.cancel()

    watch = asyncio.create_task(wait_gone())
    watch.add_done_callback(cancel)
    try:
        return await work  # in no task of its own: each costs 50 us
    except asyncio.CancelledError:
        if is_gone and task.cancelling() == num_cancelling + 1:  # by nobody else
            raise ClientDisconnect from None
        raise
    finally:
        is_over = True  # the callback may be on its way
        watch.cancel()
        if is_gone:
            task.uncancel()


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
