"""One accepted request on its way between the event loop and the engine thread."""

import asyncio
from collections import defaultdict
from collections.abc import Iterable
from time import perf_counter

from engine.request import Event, Failed, Finished, Request


class Ticket:
    """What `Worker.submit` returns: an async iterator of events; closing it cancels the request.

    `num_tokens` is what it may take in all, for the bounds of the queue.
    """

    def __init__(
        self, request: Request, loop: asyncio.AbstractEventLoop, num_tokens: int = 0
    ) -> None:
        self.request = request
        self.num_tokens = num_tokens
        self.submitted = perf_counter()
        self._is_cancelled = False  # read by other threads, and only ever set
        self._loop = loop
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._done = False

    def is_cancelled(self) -> bool:
        """Whether nobody listens any more."""
        return self._is_cancelled

    def cancel(self) -> None:
        """Note that nobody listens any more; from any thread."""
        self._is_cancelled = True

    def put(self, event: Event) -> None:
        """Hand an event over, from another thread than the loop's."""
        put_all([(self, event)])

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """Where its events are read."""
        return self._loop

    def take(self, event: Event) -> None:
        """Take an event, on the loop."""
        self._events.put_nowait(event)

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        event = await self._events.get()
        if event is None:
            raise StopAsyncIteration
        self._done = isinstance(event, Finished | Failed)
        return event

    async def aclose(self) -> None:
        """Stop listening; the engine drops the request at its next step."""
        self._done = True
        self.cancel()
        self._events.put_nowait(None)  # for who waits for an event: none will come


def put_all(told: Iterable[tuple[Ticket, Event]]) -> None:
    """Hand events over, from another thread: each loop is woken once for all of its own.

    Waking it for each event costs a system call and a change of threads for each.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event]]] = defaultdict(list)
    for ticket, event in told:
        by_loop[ticket.loop].append((ticket, event))
    for loop, pairs in by_loop.items():
        try:
            loop.call_soon_threadsafe(_take_each, pairs)
        except RuntimeError:  # the loop is closed: nobody listens any more
            for ticket, _ in pairs:
                ticket.cancel()


def _take_each(pairs: list[tuple[Ticket, Event]]) -> None:
    for ticket, event in pairs:
        ticket.take(event)
