"""The engine thread and its asyncio front: requests in by `submit`, events out by a stream."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

from engine.config import ModelConfig
from engine.errors import EngineError, EngineStopped, Overloaded
from engine.experts import OffloadedExperts
from engine.generation import generate
from engine.model.transformer import Transformer
from engine.prompt import check_tokenizer
from engine.request import Event, Failed, Finished, Request
from engine.tokenizer import Tokenizer
from offload.pipeline import PipelineStats

logger = logging.getLogger(__name__)

State = Literal["starting", "loading", "ready", "draining", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a loader hands to the worker. Raises TokenizerError if the two do not fit."""

    model: Transformer
    tokenizer: Tokenizer
    experts: OffloadedExperts | None = None  # None: all are resident

    def __post_init__(self) -> None:
        check_tokenizer(self.tokenizer, self.model.config)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the start, and the present load."""

    queued: int
    running: int
    requests: int
    prompt_tokens: int
    completion_tokens: int
    experts: PipelineStats | None  # None: all experts are resident


class Ticket:
    """One accepted request on its way.

    An async iterator of events; closing it cancels the request.
    """

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.submitted = perf_counter()
        self.cancelled = threading.Event()
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._done = False

    def put(self, event: Event) -> None:
        """Hand an event over, from the engine thread."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the loop is closed: nobody listens any more
            self.cancelled.set()

    def __aiter__(self) -> "Ticket":
        return self

    async def __anext__(self) -> Event:
        if self._done:
            raise StopAsyncIteration
        event = await self._events.get()
        self._done = isinstance(event, Finished | Failed)
        return event

    async def aclose(self) -> None:
        """Stop listening; the engine drops the request at its next step."""
        self._done = True
        self.cancelled.set()


class Worker:
    """Runs one model in one thread.

    Requests wait in a bounded queue and are served one after another.

    `load` is called in the engine thread, so that `start` returns at once; it is given a function
    that reports the phase. States: starting, loading, ready, draining, stopped; failed when loading
    or the thread itself broke.
    """

    def __init__(
        self,
        model_name: str,
        load: Callable[[Callable[[str], None]], LoadedModel],
        max_queue: int = 64,
    ) -> None:
        self.model_name = model_name
        self.state: State = "starting"
        self.phase = "starting"
        self.failure: str | None = None
        self._load = load
        self._max_queue = max_queue
        self._loaded: LoadedModel | None = None
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._changed = threading.Condition()
        self._counts = {"requests": 0, "prompt_tokens": 0, "completion_tokens": 0}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread, which loads the model first."""
        self._thread.start()

    @property
    def config(self) -> ModelConfig:
        """Config of the model. Raises EngineStopped before it is loaded."""
        return self._model().model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model. Raises EngineStopped before it is loaded."""
        return self._model().tokenizer

    def _model(self) -> LoadedModel:
        if self._loaded is None:
            detail = self.failure or f"{self.phase}; ask /health/ready"
            raise EngineStopped(f"the model is not loaded: {detail}")
        return self._loaded

    def submit(self, request: Request) -> Ticket:
        """Queue a request; call it on the event loop that will read the events.

        Raises EngineStopped unless the worker is ready, Overloaded if the queue is full.
        """
        ticket = Ticket(request, asyncio.get_running_loop())
        with self._changed:
            if self.state != "ready":
                raise EngineStopped(f"the engine is {self.state}; no request is accepted")
            self._waiting = deque(t for t in self._waiting if not t.cancelled.is_set())
            if len(self._waiting) >= self._max_queue:
                raise Overloaded(
                    f"{len(self._waiting)} requests are waiting already; try again later"
                )
            self._waiting.append(ticket)
            self._changed.notify_all()
        return ticket

    def stats(self) -> EngineStats:
        """A snapshot of counts and load."""
        with self._changed:
            queued = sum(not ticket.cancelled.is_set() for ticket in self._waiting)
            offloaded = self._loaded.experts if self._loaded else None
            experts = offloaded.stats if offloaded else None
            return EngineStats(
                queued, int(self._running is not None), **self._counts, experts=experts
            )

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, finish those accepted, end the thread. Blocks.

        False if the thread goes on: time ran out, and what was not finished ended with Failed; or a
        model is being loaded, for which nobody waits any more.
        """
        with self._changed:
            if self.state in ("starting", "loading"):
                timeout_s = 0.0
            if self.state in ("starting", "loading", "ready"):
                self.state = self.phase = "draining"
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        if not self._thread.is_alive():
            return True
        with self._changed:
            left = self._take_unfinished()
        for ticket in left:
            ticket.cancelled.set()
            ticket.put(Failed("the server stopped before the request was finished"))
        return False

    def _run(self) -> None:
        """The engine thread. Whatever ends it, no request is left without an end."""
        try:
            if self._start_model():
                while (ticket := self._next()) is not None:
                    self._serve(ticket)
        except Exception:  # our own mistake; the thread's last chance to say so
            logger.exception("the engine thread broke")
            with self._changed:
                self.failure, self.state = "the engine thread broke", "failed"
        with self._changed:
            left = self._take_unfinished()
            if self.state != "failed":
                self.state = "stopped"
        for ticket in left:
            ticket.put(Failed("the engine ended before the request was finished"))

    def _take_unfinished(self) -> list[Ticket]:
        left = [*([self._running] if self._running else []), *self._waiting]
        self._waiting.clear()
        self._running = None
        return left

    def _start_model(self) -> bool:
        with self._changed:
            if self.state == "draining":
                return False
            self.state = "loading"
        try:
            self._loaded = self._load(self._report_phase)
        except (EngineError, OSError, ValueError, RuntimeError, MemoryError) as error:
            logger.error("loading %s failed: %s", self.model_name, error)  # noqa: TRY400  a user's mistake
            with self._changed:
                self.failure, self.state = str(error), "failed"
            return False
        with self._changed:
            if self.state != "loading":  # drained meanwhile
                return False
            self.state = self.phase = "ready"
        logger.info("%s is ready", self.model_name)
        return True

    def _report_phase(self, phase: str) -> None:
        self.phase = phase

    def _next(self) -> Ticket | None:
        with self._changed:
            self._running = None
            while True:
                while self._waiting:
                    ticket = self._waiting.popleft()
                    if not ticket.cancelled.is_set():
                        self._running = ticket
                        return ticket
                if self.state != "ready":
                    return None
                self._changed.wait()

    def _serve(self, ticket: Ticket) -> None:
        assert self._loaded is not None
        queued_s = perf_counter() - ticket.submitted
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        experts = self._loaded.experts
        before = experts.stats if experts else None
        try:
            for event in generate(model, tokenizer, ticket.request, queued_s=queued_s):
                if ticket.cancelled.is_set():
                    logger.info("%s cancelled", ticket.request.request_id)
                    return
                if isinstance(event, Finished):
                    if experts and before:  # one request at a time: what was counted is its own
                        event = replace(event, experts=experts.stats - before)
                    self._count(event)
                ticket.put(event)
        except (EngineError, RuntimeError, ValueError, MemoryError) as error:
            # one request must not take the engine down; whoever sent it is told
            logger.exception("%s failed", ticket.request.request_id)
            ticket.put(
                Failed(f"the engine could not carry out the request: {type(error).__name__}")
            )

    def _count(self, event: Finished) -> None:
        with self._changed:
            self._counts["requests"] += 1
            self._counts["prompt_tokens"] += event.prompt_tokens
            self._counts["completion_tokens"] += event.completion_tokens
