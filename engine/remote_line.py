"""The gateway's end of the way of requests: orders go down, events come up, on one event loop."""

import asyncio
import itertools
import weakref
from collections import deque
from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from engine.adapters import Adapter
from engine.grammar import Grammar, Kind
from engine.pace import Pace
from engine.remote_messages import (
    Cancel,
    Entry,
    Lend,
    Order,
    Submit,
    TakeBack,
    Unpacker,
    event_of,
    pack,
)
from engine.remote_wire import Wire
from engine.request import Failed, Request
from engine.ticket import ENDS, Ticket


class RemoteTicket(Ticket):
    """A ticket of a request that another process carries out; closing it tells that process."""

    def __init__(self, request: Request, num_tokens: int, number: int, line: "Line") -> None:
        super().__init__(request, asyncio.get_running_loop(), num_tokens, number)
        self._line = line

    def close(self) -> None:
        """Stop listening; the engine drops the request when it hears of it."""
        was_open = not self.is_closed
        super().close()
        if was_open:
            self._line.cancel(self)


class Loans:
    """Adapters that the engine has: each goes there once, and back when nobody here has it."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}  # by the identity of the vectors, as engines know them
        self._count = itertools.count()
        self._gone: deque[int] = deque()  # written by whatever thread lets one go

    def lend(self, adapter: Adapter | None) -> tuple[int | None, list[Order]]:
        """The number of an adapter, and what the engine must be told first."""
        orders: list[Order] = []
        while self._gone:
            orders.append(TakeBack(self._gone.popleft()))
        if adapter is None:
            return None, orders
        key = id(adapter.prompt_PD)
        number = self._numbers.get(key)
        if number is None:
            number = next(self._count)
            self._numbers[key] = number
            self._watch(adapter.prompt_PD, key, number)
            orders.append(Lend(number, adapter))
        return number, orders

    def _watch(self, prompt_PD: Tensor, key: int, number: int) -> None:
        def let_go() -> None:
            del self._numbers[key]
            self._gone.append(number)

        weakref.finalize(prompt_PD, let_go).atexit = False


class Line:
    """The requests that are open, and the socket of their orders and events.

    `pace` is told of begins and ends. What the socket has no room for is held here. All is done on
    the event loop that `submit` is called on; when that is closed its requests are cancelled by the
    first on the next one.
    """

    def __init__(self, wire: Wire, pace: Pace) -> None:
        self._wire = wire
        self._pace = pace
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unpacker = Unpacker()
        self._held = bytearray()
        self._numbers = itertools.count(1)
        self._loans = Loans()
        self._tickets: dict[int, RemoteTicket] = {}
        self._waiting: dict[int, RemoteTicket] = {}

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Where requests came from, if any did."""
        return self._loop

    def waiting(self) -> Iterator[RemoteTicket]:
        """Requests that have not been begun, as far as is known."""
        return iter(self._waiting.values())

    def submit(self, request: Request, num_tokens: int) -> RemoteTicket:
        """Send a request to the engine, which will carry it out."""
        self._attach()
        if not self._tickets:
            self._pace.begin()
        ticket = RemoteTicket(request, num_tokens, next(self._numbers), self)
        loan, orders = self._loans.lend(request.adapter)
        grammar = request.params.grammar
        orders.append(Submit(ticket.number, _bare(request), loan, _spec_of(grammar)))
        self._tickets[ticket.number] = self._waiting[ticket.number] = ticket
        self._send(b"".join(map(pack, orders)))
        return ticket

    def cancel(self, ticket: RemoteTicket) -> None:
        """Tell the engine that nobody reads a request's events; some may yet come."""
        self._waiting.pop(ticket.number, None)
        if ticket.number in self._tickets:
            self._send(pack(Cancel(ticket.number)))

    def end(self, failure: Failed) -> None:
        """Read what there is, then fail all that is open; the engine has gone."""
        self._read()
        self._leave_loop()
        self._waiting.clear()
        while self._tickets:
            self._tickets.popitem()[1].take(failure)
        self._wire.close()

    def _attach(self) -> None:
        loop = asyncio.get_running_loop()
        if loop is self._loop:
            return
        assert self._loop is None or self._loop.is_closed(), "one event loop at a time"
        self._loop = loop
        loop.add_reader(self._wire.rung, self._hear)
        if self._held:
            loop.add_writer(self._wire.line, self._write)
        for ticket in list(self._tickets.values()):
            ticket.close()

    def _leave_loop(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._wire.rung)
            self._loop.remove_writer(self._wire.line)

    # --- the socket

    def _send(self, data: bytes) -> None:
        assert self._loop is not None
        if not self._held:
            try:
                data = data[self._wire.send(data) :]
            except BlockingIOError:
                pass
            except OSError:  # it has gone; the control socket tells why, and ends all
                return
            if data:
                self._loop.add_writer(self._wire.line, self._write)
        self._held += data

    def _write(self) -> None:
        try:
            del self._held[: self._wire.send(self._held)]
        except BlockingIOError:
            return
        except OSError:
            self._held.clear()
        if not self._held and self._loop is not None:
            self._loop.remove_writer(self._wire.line)

    def _hear(self) -> None:
        self._wire.wait()
        self._read()

    def _read(self) -> None:
        """Take in all that has come."""
        while data := self._wire.read():
            for message in self._unpacker.push(data):
                assert isinstance(message, tuple)
                self._take(*message)

    def _take(self, entries: list[Entry], begun: list[int], closed: list[int]) -> None:
        for entry in entries:
            ticket = self._tickets.get(entry[0])
            if ticket is None:
                continue
            event = event_of(entry)
            if isinstance(event, ENDS):
                del self._tickets[ticket.number]
                self._waiting.pop(ticket.number, None)
                if not ticket.is_closed:
                    self._pace.note_end()
            ticket.take(event)
        for number in begun:
            self._waiting.pop(number, None)
        for number in closed:
            self._tickets.pop(number, None)


def _bare(request: Request) -> Request:
    """A request without what it shares with others, which has a way of its own."""
    if request.params.grammar is not None:
        request = replace(request, params=replace(request.params, grammar=None))
    return request if request.adapter is None else replace(request, adapter=None)


def _spec_of(grammar: Grammar | None) -> tuple[Kind, str] | None:
    return None if grammar is None else (grammar.kind, grammar.spec)
