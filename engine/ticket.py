"""One accepted request on its way between the event loop and the engine thread."""

import asyncio
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter

from engine.request import Event, Failed, Finished, Request

ENDS = (Finished, Failed)


class Ticket:
    """What `Worker.submit` returns: an async iterator of events; closing it cancels the request.

    Who wants no task of its own for each request has it `listen` instead. `num_tokens` is what it
    may take in all, for the bounds of the queue. What the step under way makes after it was closed
    nobody reads, but `count_late` has it told. One without a loop tells nothing itself: who takes
    its events from the worker knows it by its `number`.
    """

    def __init__(
        self,
        request: Request,
        loop: asyncio.AbstractEventLoop | None,
        num_tokens: int = 0,
        number: int = 0,
    ) -> None:
        self.request = request
        self.num_tokens = num_tokens
        self.number = number
        self.submitted = perf_counter()
        self._is_cancelled = False  # read by other threads, and only ever set
        self._loop = loop
        self._events: deque[Event] = deque()
        self._sink: Callable[[Event], None] | None = None
        self._late: Callable[[Event], object] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._done = False

    def is_cancelled(self) -> bool:
        """Whether nobody listens any more."""
        return self._is_cancelled

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or has told its end: what comes now is counted at most."""
        return self._done

    def cancel(self) -> None:
        """Note that nobody listens any more; from any thread."""
        self._is_cancelled = True

    def put(self, event: Event) -> None:
        """Hand an event over, from another thread than the loop's."""
        put_all([(self, event)])

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Where its events are read."""
        return self._loop

    def take(self, event: Event) -> None:
        """Take an event, on the loop; after the end nothing more is told."""
        if self._done:
            if self._late is not None:
                self._late(event)
            return
        if self._sink is not None:
            self._done = isinstance(event, ENDS)
            self._sink(event)
            return
        self._events.append(event)
        self._wake()

    def listen(self, sink: Callable[[Event], None]) -> None:
        """Give all events to a function, on the loop, instead of to who iterates."""
        self._sink = sink
        while self._events:
            self.take(self._events.popleft())

    def count_late(self, count: Callable[[Event], object]) -> None:
        """Have what comes once it is closed told to a function, on the loop."""
        self._late = count

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Event:
        while not self._done and not self._events:
            assert self._loop is not None  # else nobody reads here
            self._waiter = self._loop.create_future()
            await self._waiter
        if self._done:
            raise StopAsyncIteration
        event = self._events.popleft()
        self._done = isinstance(event, ENDS)
        return event

    async def aclose(self) -> None:
        """Stop listening; the engine drops the request at its next step."""
        self.close()

    def close(self) -> None:
        """As `aclose`."""
        self._done = True
        self._sink = None
        self._events.clear()
        self.cancel()
        self._wake()  # who waits for an event: none will come


Told = Sequence[tuple[Ticket, Event]]


def put_all(told: Iterable[tuple[Ticket, Event]]) -> None:
    """Hand events over, from another thread: each loop is woken once for all of its own.

    Waking it for each event costs a system call and a change of threads for each.
    """
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Event]]] = defaultdict(list)
    for ticket, event in told:
        assert ticket.loop is not None
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
