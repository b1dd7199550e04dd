"""The process of an engine: a worker on one side, the gateway that started it on the other.

It ends with its gateway: when the sockets close, or at once where the system can be asked for that.
"""

import copy
import ctypes
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import Connection
from time import monotonic

from engine.adapters import Adapter
from engine.errors import EngineError, EngineStopped
from engine.garbage import spare_modules
from engine.grammar import Kind, rebuild_grammar
from engine.opening import start_worker
from engine.remote_messages import (
    Ask,
    Cancel,
    Drain,
    Drained,
    Facts,
    Lend,
    Logged,
    News,
    Opening,
    Status,
    Submit,
    TakeBack,
    Turn,
    Unpacker,
    entries_of,
    pack_turn,
)
from engine.remote_outbox import Outbox
from engine.remote_wire import Wire
from engine.request import Failed, Request
from engine.scheduler import Limits
from engine.ticket import ENDS, Ticket, Told
from engine.worker import Worker, within_plan

logger = logging.getLogger(__name__)

LOADING_LOOK_S = 0.05
LOOK_S = 0.1
BEAT_S = 1.0  # how often the gateway hears of the engine when there is no news
PR_SET_PDEATHSIG = 1  # of prctl(2)


class Reporter:
    """The engine's end of the control socket, for any thread."""

    def __init__(self, control: Connection) -> None:
        self._control = control
        self._lock = threading.Lock()

    def tell(self, news: News) -> None:
        """Tell the gateway something; nothing happens when it is gone."""
        with self._lock, suppress(OSError):
            self._control.send(news)


class LogForwarder(logging.Handler):
    """Has the gateway write what is logged here, so that there is one writer of one form."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__()
        self._reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        """Send a record; its arguments may be anything, so they go as text."""
        plain = copy.copy(record)
        plain.msg, plain.args = record.getMessage(), None
        plain.exc_info = plain.exc_text = None
        trace = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
        self._reporter.tell(Logged(plain, trace))


class Host:
    """Carries out what a gateway orders, by a worker that `start` makes and starts."""

    def __init__(
        self,
        control: Connection,
        wire: Wire,
        reporter: Reporter,
        start: Callable[[Callable[[Told], None]], Worker],
    ) -> None:
        self._control = control
        self._wire = wire
        self._reporter = reporter
        self._outbox = Outbox(wire)
        self._lock = threading.Lock()  # of the three fields below
        self._tickets: dict[int, Ticket | None] = {}  # None: its grammar is being compiled
        self._unbegun: set[int] = set()
        self._closing: list[int] = []
        self._adapters: dict[int, Adapter] = {}
        self._compilers = ThreadPoolExecutor(1, "grammar")
        self._told: tuple[object, ...] = ()
        self._told_s = 0.0
        self._num_answered = 0
        self._has_facts = False
        self._is_over = False
        self._worker = start(self._deliver)

    def run(self) -> bool:
        """Serve until the gateway is gone; False if something here broke that it waits for."""
        threading.Thread(target=self._read_orders, name="engine-orders", daemon=True).start()
        with suppress(EOFError, OSError):
            while not self._is_over:
                is_loading = self._worker.state in ("starting", "loading")
                if self._control.poll(LOADING_LOOK_S if is_loading else LOOK_S):
                    self._answer(self._control.recv())
                self._tell_news()
        is_broken, self._is_over = self._is_over, True
        self._wire.ring_here()
        return not is_broken

    def _answer(self, message: Ask | Drain) -> None:
        if isinstance(message, Drain):
            drain = threading.Thread(target=self._drain, args=(message.timeout_s,), daemon=True)
            drain.start()
            return
        self._num_answered += 1
        self._told = ()  # is news

    def _tell_news(self) -> None:
        """Tell what the worker is at, if that has changed, or once in a while."""
        worker, progress = self._worker, self._worker.progress
        state = worker.state
        if state == "ready" and not self._has_facts:
            self._has_facts = True
            plan = worker.plan
            most = within_plan(Limits(), plan).cache_bytes if plan else None
            self._reporter.tell(Facts(worker.config, worker.adapter_base, plan, most))
        news = (state, worker.phase, worker.failure, progress.read_bytes, progress.total_bytes)
        now = monotonic()
        if news == self._told and now - self._told_s < BEAT_S:
            return
        self._told, self._told_s = news, now
        status = Status(*news, worker.fallbacks, worker.stats(), self._num_answered)
        self._reporter.tell(status)

    def _drain(self, timeout_s: float) -> None:
        is_done = self._worker.drain(timeout_s)
        self._outbox.flush(1.0)
        self._reporter.tell(Drained(is_done))

    # --- orders

    def _read_orders(self) -> None:
        unpacker = Unpacker()
        try:
            while not self._is_over:
                self._wire.wait()
                while data := self._wire.read():
                    for order in unpacker.push(data):
                        self._carry_out(order)
        finally:
            self._is_over = True

    def _carry_out(self, order: object) -> None:
        if isinstance(order, Submit):
            self._begin(order)
        elif isinstance(order, Cancel):
            self._cancel(order.number)
        elif isinstance(order, Lend):
            device = self._worker.adapter_base.device
            adapter = order.adapter
            if adapter.prompt_PD.device != device:
                adapter = replace(adapter, prompt_PD=adapter.prompt_PD.to(device))
            self._adapters[order.number] = adapter
        else:
            assert isinstance(order, TakeBack)
            del self._adapters[order.number]

    def _begin(self, order: Submit) -> None:
        request = order.request
        if order.adapter is not None:
            request = replace(request, adapter=self._adapters[order.adapter])
        if order.grammar is None:
            self._accept(order.number, request)
            return
        with self._lock:
            self._tickets[order.number] = None
        work = partial(self._compile, order.number, request, *order.grammar)
        self._compilers.submit(work).add_done_callback(self._look_at)

    def _look_at(self, done: Future[None]) -> None:
        self._is_over = self._is_over or done.exception() is not None
        done.result()  # logs it

    def _compile(self, number: int, request: Request, kind: Kind, spec: str) -> None:
        try:
            grammar = rebuild_grammar(kind, spec, self._worker.tokenizer)
        except (ValueError, EngineError) as error:  # the gateway found nothing wrong with it
            logger.error("a grammar cannot be compiled again: %s", error)  # noqa: TRY400
            self._refuse(number, Failed("the engine could not use the grammar"))
            return
        params = replace(request.params, grammar=grammar)
        self._accept(number, replace(request, params=params), is_known=True)

    def _accept(self, number: int, request: Request, *, is_known: bool = False) -> None:
        ticket = Ticket(request, None, number=number)
        try:
            with self._lock:
                if is_known and number not in self._tickets:
                    return  # it has been cancelled
                self._tickets[number] = ticket
                self._unbegun.add(number)
                self._worker.accept(ticket)
        except EngineError as error:  # it has stopped meanwhile; all else the gateway has checked
            self._refuse(number, Failed(str(error), is_shutdown=isinstance(error, EngineStopped)))

    def _refuse(self, number: int, failure: Failed) -> None:
        with self._lock:
            self._tickets.pop(number, None)
            self._unbegun.discard(number)
        self._outbox.send(pack_turn(Turn([(number, failure)], [], [])))

    def _cancel(self, number: int) -> None:
        with self._lock:
            if number not in self._tickets:
                return  # its end is on the way
            ticket = self._tickets.pop(number)
            self._unbegun.discard(number)
            # The step under way may yet make something: so it is told after that.
            self._closing.append(number)
        if ticket is not None:
            ticket.close()

    # --- events

    def _deliver(self, told: Told) -> None:
        """Send what a turn came to; in the engine thread, or in that which fails requests."""
        with self._lock:
            closed, self._closing = self._closing, []
            for ticket, event in told:
                if isinstance(event, ENDS):
                    self._tickets.pop(ticket.number, None)
            begun = self._take_begun()
        if told or begun or closed:
            self._outbox.send(pack_turn(Turn(entries_of(told), begun, closed)))

    def _take_begun(self) -> list[int]:
        """Requests that do not wait any more."""
        if not self._unbegun:
            return []
        waiting = {ticket.number for ticket in self._worker.waiting()}
        begun = [number for number in self._unbegun if number not in waiting]
        self._unbegun.difference_update(begun)
        return begun


def die_with_parent(parent: int) -> None:
    """Have the system kill this process when the thread that started it ends; Linux only."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before
        os._exit(1)


def main() -> None:
    """Serve the gateway at the other ends: the arguments are numbers of a socket and of a wire.

    A fifth one is the process to die with.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # these are for the gateway, which tells what to do
    control_fd, line_fd, rung, bell, *parent = map(int, sys.argv[1:])
    if parent:
        die_with_parent(parent[0])
    control, wire = Connection(control_fd), Wire(socket.socket(fileno=line_fd), rung, bell)
    try:
        opening: Opening = control.recv()
    except (EOFError, OSError):
        return
    spare_modules()
    reporter = Reporter(control)
    root = logging.getLogger()
    root.handlers[:] = [LogForwarder(reporter)]
    root.setLevel(opening.log_level)
    logging.captureWarnings(capture=True)
    start = partial(start_worker, opening.options)
    is_well = Host(control, wire, reporter, start).run()
    os._exit(0 if is_well else 1)  # Python cannot end under a thread that is inside torch


if __name__ == "__main__":
    main()
