"""The engine thread and its asyncio front: requests in by `submit`, events out by a stream."""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

from engine.config import ModelConfig
from engine.engine import Engine
from engine.errors import EngineError, EngineStopped, Overloaded
from engine.experts import OffloadedExperts
from engine.model.transformer import Transformer
from engine.pace import Pace
from engine.planning import CACHES, MemoryPlan
from engine.prompt import check_tokenizer
from engine.request import Event, Failed, Finished, Request
from engine.scheduler import Limits
from engine.tokenizer import Tokenizer
from offload.pipeline import PipelineStats

logger = logging.getLogger(__name__)

DEFAULT_LIMITS = Limits()

State = Literal["starting", "loading", "ready", "draining", "failed", "stopped"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """What a loader hands to the worker. Raises TokenizerError if the two do not fit."""

    model: Transformer
    tokenizer: Tokenizer
    experts: OffloadedExperts | None = None  # None: all are resident
    plan: MemoryPlan | None = None
    close: Callable[[], None] = lambda: None  # called in the engine thread, when it ends

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


def within_plan(limits: Limits, plan: MemoryPlan) -> Limits:
    """Limits that need no more caches and no longer sweeps than a plan has memory for."""
    planned = plan.workload.rows * plan.workload.source_tokens
    return replace(
        limits,
        cache_bytes=plan.parts()[CACHES],
        max_sweep_tokens=min(limits.max_sweep_tokens, planned),
    )


class Ticket:
    """One accepted request on its way.

    An async iterator of events; closing it cancels the request.
    """

    def __init__(self, request: Request, loop: asyncio.AbstractEventLoop) -> None:
        self.request = request
        self.submitted = perf_counter()
        self.cancelled = threading.Event()
        self._loop = loop
        self._events: asyncio.Queue[Event | None] = asyncio.Queue()
        self._done = False

    def is_cancelled(self) -> bool:
        """Whether nobody listens any more."""
        return self.cancelled.is_set()

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
        if event is None:
            raise StopAsyncIteration
        self._done = isinstance(event, Finished | Failed)
        return event

    async def aclose(self) -> None:
        """Stop listening; the engine drops the request at its next step."""
        self._done = True
        self.cancelled.set()
        self._events.put_nowait(None)  # for who waits for an event: none will come


class Worker:
    """Runs one model in one thread. Requests wait in a bounded queue and are served together.

    `load` is called in the engine thread, so that `start` returns at once; it is given a function
    that reports the phase. States: starting, loading, ready, draining, stopped; failed when loading
    or the thread itself broke.
    """

    def __init__(
        self,
        model_name: str,
        load: Callable[[Callable[[str], None]], LoadedModel],
        max_queue: int = 64,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.model_name = model_name
        self.state: State = "starting"
        self.phase = "starting"
        self.failure: str | None = None
        self._load = load
        self._limits = limits
        self._max_queue = max_queue
        self._loaded: LoadedModel | None = None
        self._engine: Engine[Ticket] | None = None
        self._arrived: deque[Ticket] = deque()
        self._open: set[Ticket] = set()
        self._changed = threading.Condition()
        self._pace = Pace()
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

    @property
    def plan(self) -> MemoryPlan | None:
        """How memory is shared out; None before the model is loaded, or if nobody planned."""
        return self._loaded.plan if self._loaded else None

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What works in a slower way than it should, and why."""
        experts = self._loaded.experts if self._loaded else None
        return experts.fallbacks if experts else ()

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
            self._forget_closed()
            waiting = self._num_waiting()
            if waiting >= self._max_queue:
                # the first place that is free goes to the first to come: let half of them go
                wait_s = self._pace.wait_s(-(-waiting // 2))
                text = f"{waiting} requests are waiting already; try again later"
                raise Overloaded(text, wait_s)
            self._arrived.append(ticket)
            self._open.add(ticket)
            self._changed.notify_all()
        return ticket

    def stats(self) -> EngineStats:
        """A snapshot of counts and load."""
        with self._changed:
            offloaded = self._loaded.experts if self._loaded else None
            experts = offloaded.stats if offloaded else None
            running = self._engine.running if self._engine else 0
            return EngineStats(self._num_waiting(), running, **self._counts, experts=experts)

    def _forget_closed(self) -> None:
        self._open = {ticket for ticket in self._open if not ticket.is_cancelled()}

    def _num_waiting(self) -> int:
        """Requests that have not been begun and that somebody waits for."""
        arrived = sum(not ticket.is_cancelled() for ticket in self._arrived)
        return arrived + (self._engine.num_waiting() if self._engine else 0)

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
            text = "the server stopped before the request was finished"
            ticket.put(Failed(text, is_shutdown=True))
        return False

    def _run(self) -> None:
        """The engine thread. Whatever ends it, no request is left without an end."""
        try:
            self._start_model()
            if self._loaded is not None:
                with closing(self._loaded):
                    self._serve()
        except Exception:  # our own mistake; the thread's last chance to say so
            logger.exception("the engine thread broke")
            with self._changed:
                self.failure = "the engine thread broke"
                self.state = self.phase = "failed"
        with self._changed:
            left = self._take_unfinished()
            if self.state != "failed":
                self.state = self.phase = "stopped"
        for ticket in left:
            ticket.put(Failed("the engine ended before the request was finished"))

    def _take_unfinished(self) -> list[Ticket]:
        left = [ticket for ticket in self._open if not ticket.is_cancelled()]
        self._arrived.clear()
        self._open.clear()
        return left

    def _start_model(self) -> None:
        with self._changed:
            if self.state == "draining":
                return
            self.state = "loading"
        try:
            self._loaded = self._load(self._report_phase)
        except (EngineError, OSError, ValueError, RuntimeError, MemoryError) as error:
            logger.error("loading %s failed: %s", self.model_name, error)  # noqa: TRY400  a user's mistake
            with self._changed:
                self.failure = str(error)
                self.state = self.phase = "failed"
            return
        with self._changed:
            if self.state != "loading":  # drained meanwhile
                return
            self.state = self.phase = "ready"
        logger.info("%s is ready", self.model_name)

    def _report_phase(self, phase: str) -> None:
        self.phase = phase

    def _serve(self) -> None:
        assert self._loaded is not None
        model, tokenizer, experts = self._loaded.model, self._loaded.tokenizer, self._loaded.experts
        moved = (lambda: experts.stats) if experts else (lambda: None)
        limits = within_plan(self._limits, self._loaded.plan) if self._loaded.plan else self._limits
        self._engine = Engine(model, tokenizer, limits, moved)
        self._pace.begin()
        while self._take_in(self._engine):
            for ticket, event in self._engine.turn():
                self._tell(ticket, event)

    def _take_in(self, engine: "Engine[Ticket]") -> bool:
        """Hand over what has arrived; wait if there is nothing to do. False: it is over."""
        with self._changed:
            while True:
                while self._arrived:
                    engine.add(self._arrived.popleft())
                if engine.running or len(engine.scheduler):
                    return True
                self._forget_closed()
                if self.state != "ready":
                    return False
                self._changed.wait()
                self._pace.begin()

    def _tell(self, ticket: Ticket, event: Event) -> None:
        if isinstance(event, Finished | Failed):
            with self._changed:
                is_open = ticket in self._open  # else `drain` has ended it
                if ticket.is_cancelled() or not is_open:
                    return
                self._open.discard(ticket)
                self._pace.note_end()
                self._count(event)
        if not ticket.is_cancelled():
            ticket.put(event)

    def _count(self, event: Finished | Failed) -> None:
        if isinstance(event, Finished):
            self._counts["requests"] += 1
            self._counts["prompt_tokens"] += event.prompt_tokens
            self._counts["completion_tokens"] += event.completion_tokens
