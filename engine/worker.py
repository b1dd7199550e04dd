"""The engine thread and its asyncio front: requests in by `submit`, events out by a stream."""

import asyncio
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Literal

from engine.adapters import Base, describe_base
from engine.config import ModelConfig
from engine.demands import make_demand
from engine.engine import Engine
from engine.errors import EngineError, EngineStopped, Overloaded
from engine.experts import OffloadedExperts
from engine.failures import DeviceLost
from engine.model.transformer import Transformer
from engine.pace import Pace
from engine.planning import CACHES, MemoryPlan
from engine.progress import LoadProgress
from engine.prompt import check_tokenizer
from engine.queue_limits import QueueLimits, Waiting
from engine.request import Event, Failed, Finished, Request
from engine.scheduler import Limits
from engine.stats import CacheStats, EngineStats, WorkStats
from engine.ticket import Ticket, Told, put_all
from engine.tokenizer import Tokenizer

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
        try:
            check_tokenizer(self.tokenizer, self.model.config)
        except EngineError:
            self.close()  # nobody will have it who could
            raise


def within_plan(limits: Limits, plan: MemoryPlan) -> Limits:
    """Limits that need no more caches and no longer sweeps than a plan has memory for."""
    planned = plan.workload.rows * plan.workload.source_tokens
    return replace(
        limits,
        cache_bytes=plan.parts()[CACHES],
        max_sweep_tokens=min(limits.max_sweep_tokens, planned),
    )


class Worker:
    """Runs one model in one thread. Requests wait in a bounded queue and are served together.

    The queue is bounded by `max_queue` requests and `max_queue_tokens` that they may take, if given
    (`QueueLimits`). With `stall_s`, a step that takes longer is the end: the state is failed and so
    is every request, and who runs the process should leave it, as the thread may never come back.

    `load` is called in the engine thread, so that `start` returns at once; it is given a function
    that reports the phase. States: starting, loading, ready, draining, stopped; failed when loading
    or the thread itself broke. `deliver` takes the events of each turn, in the engine thread.
    """

    def __init__(
        self,
        model_name: str,
        load: Callable[[Callable[[str], None]], LoadedModel],
        max_queue: int = 64,
        limits: Limits = DEFAULT_LIMITS,
        max_queue_tokens: int | None = None,
        stall_s: float | None = None,
        deliver: Callable[[Told], None] = put_all,
    ) -> None:
        self.model_name = model_name
        self.state: State = "starting"
        self.phase = "starting"
        self.failure: str | None = None
        self.progress = LoadProgress()  # for who loads to fill in
        self._load = load
        self._limits = limits
        self._queue_limits = QueueLimits(max_requests=max_queue, max_tokens=max_queue_tokens)
        self._stall_s = stall_s
        self._deliver = deliver
        self._is_in_turn = False
        self._ended = threading.Event()
        self._loaded: LoadedModel | None = None
        self._base: Base | None = None
        self._engine: Engine[Ticket] | None = None
        self._arrived: deque[Ticket] = deque()
        self._open: set[Ticket] = set()
        self._changed = threading.Condition()
        self._pace = Pace()
        names = ("requests", "cancelled", "failed", "prompt_tokens", "completion_tokens")
        self._counts = dict.fromkeys(names, 0)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine thread, which loads the model first, and who watches it."""
        self._thread.start()
        if self._stall_s is not None:
            watch = threading.Thread(target=self._watch, args=(self._stall_s,), daemon=True)
            watch.name = "engine-watch"
            watch.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread goes on, whatever the state says."""
        return self._thread.is_alive()

    def stalled_s(self) -> float:
        """How long the present step has been going on; 0 while there is none."""
        engine = self._engine
        return perf_counter() - engine.noted if engine and self._is_in_turn else 0.0

    @property
    def config(self) -> ModelConfig:
        """Config of the model. Raises EngineStopped before it is loaded."""
        return self._model().model.config

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model. Raises EngineStopped before it is loaded."""
        return self._model().tokenizer

    @property
    def adapter_base(self) -> Base:
        """What adapters are read for. Raises EngineStopped before the model is loaded."""
        if self._base is None:
            self._base = describe_base(self._model().model)
        return self._base

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

        Raises EngineStopped unless the worker is ready, Overloaded if the queue is full,
        RequestError if the request could never be carried out.
        """
        return self.accept(Ticket(request, asyncio.get_running_loop()))

    def accept(self, ticket: Ticket) -> Ticket:
        """As `submit`, by a ticket that is there already."""
        request = ticket.request
        with self._changed:
            self._require_engine().check(request)
            ticket.num_tokens = make_demand(request, self._model().model).cost
            self._forget_closed()
            self._require_place([Waiting(request.key, ticket.num_tokens)])
            self._arrived.append(ticket)
            self._open.add(ticket)
            self._changed.notify_all()
        return ticket

    def require_room(self, num_requests: int, num_tokens: int = 0, key: str = "") -> None:
        """Raise what `submit` would if so many requests, of so many tokens in all, came now.

        To be asked before work is put into them; nothing is reserved.
        """
        with self._changed:
            self._require_engine()
            wanted = [Waiting(key, 0) for _ in range(num_requests - 1)]
            self._require_place([*wanted, Waiting(key, num_tokens)])

    def _require_engine(self) -> "Engine[Ticket]":
        if self.state != "ready" or self._engine is None:
            raise EngineStopped(f"the engine is {self.state}; no request is accepted")
        return self._engine

    def _require_place(self, wanted: list[Waiting]) -> None:
        tickets = self.waiting()
        waiting = [Waiting(ticket.request.key, ticket.num_tokens) for ticket in tickets]
        if (text := self._queue_limits.find_refusal(waiting, wanted)) is not None:
            # the first place that is free goes to the first to come: let half of them go
            raise Overloaded(text, self._pace.wait_s(-(-len(waiting) // 2)))

    def stats(self) -> EngineStats:
        """A snapshot of counts and load."""
        with self._changed:
            self._forget_closed()
            offloaded = self._loaded.experts if self._loaded else None
            engine, waiting = self._engine, self.waiting()
            return EngineStats(
                queued=len(waiting),
                queued_tokens=sum(ticket.num_tokens for ticket in waiting),
                running=engine.running if engine else 0,
                max_rows=(engine.scheduler if engine else self._limits).max_rows,
                stalled_s=self.stalled_s(),
                encoder_cache=engine.known if engine else CacheStats(0, 0, 0),
                experts=offloaded.stats if offloaded else None,
                work=engine.work if engine else WorkStats(),
                **self._counts,
            )

    def _forget_closed(self) -> None:
        closed = {ticket for ticket in self._open if ticket.is_cancelled()}
        self._open -= closed
        self._counts["cancelled"] += len(closed)

    def waiting(self) -> list[Ticket]:
        """Requests that have not been begun and that somebody waits for."""
        with self._changed:
            tickets = list(self._arrived)
        if self._engine is not None:
            tickets += [ticket for _, ticket in self._engine.scheduler.waiting()]
        return [ticket for ticket in tickets if not ticket.is_cancelled()]

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
        text = "the server stopped before the request was finished"
        self._fail(left, Failed(text, is_shutdown=True))
        return False

    def _run(self) -> None:
        """The engine thread. Whatever ends it, no request is left without an end."""
        text = "the engine thread broke"  # unless it comes to its end; a library may raise anything
        try:
            self._start_model()
            if self._loaded is not None:
                with closing(self._loaded):
                    if self._engine is not None:  # else it was drained while it loaded
                        self._serve(self._engine)
            text = ""
        except Exception as error:  # our own mistake, or the device; the last chance to say so
            text = str(error) if isinstance(error, DeviceLost) else text
            logger.exception("%s", text)
        finally:
            self._end(text)

    def _end(self, failure: str) -> None:
        """End all requests with the thread, which has failed if there is a text that says so."""
        self._is_in_turn = False
        with self._changed:
            left = self._take_unfinished()
            if failure:
                self.failure = failure
            if failure or self.state != "failed":
                self.state = self.phase = "failed" if failure else "stopped"
        self._fail(left, Failed("the engine ended before the request was finished"))
        self._ended.set()

    def _watch(self, stall_s: float) -> None:
        """Its own thread: until the engine's has ended, see whether a step takes too long."""
        while not self._ended.wait(stall_s / 8):
            stalled_s = self.stalled_s()
            if stalled_s > stall_s:
                self._give_up(f"a step has taken {stalled_s:.1f} s; the limit is {stall_s:g} s")
                return

    def _give_up(self, text: str) -> None:
        """Fail, and all requests, while the engine thread is stuck."""
        with self._changed:
            self.failure = text
            self.state = self.phase = "failed"
            left = self._take_unfinished()
        frame = sys._current_frames().get(self._thread.ident or 0)
        where = "".join(traceback.format_stack(frame)) if frame else ""
        logger.error("the engine is stuck: %s\n%s", text, where)
        self._fail(left, Failed(f"the engine is stuck: {text}"))

    def _take_unfinished(self) -> list[Ticket]:
        self._forget_closed()
        left = list(self._open)
        self._counts["failed"] += len(left)
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
            self._engine = self._make_engine(self._loaded)
            self.state = self.phase = "ready"
        logger.info("%s is ready", self.model_name)

    def _report_phase(self, phase: str) -> None:
        self.phase = phase

    def _make_engine(self, loaded: LoadedModel) -> "Engine[Ticket]":
        experts, plan = loaded.experts, loaded.plan
        moved = (lambda: experts.stats) if experts else (lambda: None)
        limits = within_plan(self._limits, plan) if plan else self._limits
        return Engine(loaded.model, loaded.tokenizer, limits, moved)

    def _serve(self, engine: "Engine[Ticket]") -> None:
        self._pace.begin()
        while self._take_in(engine):
            engine.noted = perf_counter()
            self._is_in_turn = True
            told = engine.turn()
            self._is_in_turn = False
            self._deliver([pair for pair in told if self._note(*pair)])

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

    def _note(self, ticket: Ticket, event: Event) -> bool:
        """Count an end; returns whether anybody is to be told of the event."""
        if isinstance(event, Finished | Failed):
            with self._changed:
                is_open = ticket in self._open  # else `drain` has ended it
                if ticket.is_cancelled() or not is_open:
                    return ticket.is_closed  # for who counts what nobody reads
                self._open.discard(ticket)
                self._pace.note_end()
                self._count(event)
        return ticket.is_closed or not ticket.is_cancelled()

    def _count(self, event: Finished | Failed) -> None:
        if isinstance(event, Failed):
            self._counts["failed"] += 1
        else:
            self._counts["requests"] += 1
            self._counts["prompt_tokens"] += event.prompt_tokens
            self._counts["completion_tokens"] += event.completion_tokens

    def _fail(self, tickets: list[Ticket], failure: Failed) -> None:
        """End tickets that are taken out; the engine may still hold them and must let them go."""
        for ticket in tickets:
            ticket.cancel()
        self._deliver([(ticket, failure) for ticket in tickets])
