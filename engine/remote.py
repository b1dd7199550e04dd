"""An engine in a process of its own, which shows itself to a server as a `Worker` does.

A gateway and an engine in one process take turns at the lock of Python: each token that one makes
waits for those that the other words. What a request needs before it is accepted is known here, so
that nobody waits for the other process to say yes or no.
"""

import logging
import threading
from contextlib import suppress
from dataclasses import replace

import torch

from engine.adapters import Base
from engine.config import ModelConfig
from engine.demands import check_request, cost_of
from engine.errors import EngineError, EngineStopped, Overloaded
from engine.grammar_vocabulary import grammar_vocabulary
from engine.options import EngineOptions
from engine.pace import Pace
from engine.planning import MemoryPlan
from engine.progress import LoadProgress
from engine.queue_limits import QueueLimits, Waiting
from engine.remote_line import Line, RemoteTicket
from engine.remote_messages import Ask, Drain, Drained, Facts, Logged, News, Opening, Status
from engine.remote_process import EngineProcess
from engine.request import Failed, Request
from engine.stats import CacheStats, EngineStats
from engine.tokenizer import Tokenizer, open_tokenizer
from engine.worker import State

logger = logging.getLogger(__name__)

ASK_S = 0.1  # for an answer: within a millisecond unless the engine holds Python's lock
GRACE_S = 3.0  # beyond a drain's own time
BEFORE_DRAIN = ("starting", "loading", "ready")
ENDED = ("failed", "stopped")
CUT = Failed("the server stopped before the request was finished", is_shutdown=True)
BROKEN = Failed("the engine ended before the request was finished")
NO_STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 1, 0.0, CacheStats(0, 0, 0), None)


class EngineTraceback(Exception):
    """The traceback of an error in the process of the engine, for the log."""


def unbounded(options: EngineOptions) -> EngineOptions:
    """Options for an engine whose queue is kept within bounds before it."""
    return replace(options, max_queue=2**31 - 1, max_queue_tokens=None)


class RemoteEngine:
    """Talks to a process that `spawn_engine` started; a thread listens to what it tells.

    States are those of a worker; failed as well when the process has ended by itself, or, with
    `stall_s`, has told nothing for longer than that.
    """

    def __init__(self, child: EngineProcess, options: EngineOptions) -> None:
        self.model_name = options.name
        self.state: State = "starting"
        self.phase = "starting"
        self.failure: str | None = None
        self.progress = LoadProgress()
        self._child = child
        self._options = options
        self._queue_limits = QueueLimits(
            max_requests=options.max_queue, max_tokens=options.max_queue_tokens
        )
        self._pace = Pace()
        self._line = Line(child.wire, self._pace)
        self._facts: Facts | None = None
        self._tokenizer: Tokenizer | None = None
        self._status: Status | None = None
        self._is_drained: bool | None = None
        self._is_over = False
        self._num_asked = 0
        self._changed = threading.Condition()  # of all of these
        self._sending = threading.Lock()
        self._thread = threading.Thread(target=self._listen, name="engine-control", daemon=True)

    def start(self) -> None:
        """Have the process load the model."""
        level = logging.getLogger().getEffectiveLevel()
        self._tell(Opening(unbounded(self._options), level))
        self._thread.start()

    # --- what it is

    @property
    def is_alive(self) -> bool:
        """Whether the process goes on, whatever the state says."""
        return self._child.process.poll() is None

    @property
    def process_id(self) -> int:
        """Which process it is."""
        return self._child.process.pid

    @property
    def config(self) -> ModelConfig:
        """Config of the model. Raises EngineStopped before it is loaded."""
        return self._loaded().config

    @property
    def tokenizer(self) -> Tokenizer:
        """Tokenizer of the model. Raises EngineStopped before it is loaded."""
        self._loaded()
        assert self._tokenizer is not None
        return self._tokenizer

    @property
    def adapter_base(self) -> Base:
        """What adapters are read for, in this process. Raises EngineStopped as `config`."""
        return self._loaded().base

    @property
    def plan(self) -> MemoryPlan | None:
        """How memory is shared out; None before the model is loaded, or if nobody planned."""
        return self._facts.plan if self._facts else None

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """What works in a slower way than it should, and why."""
        return self._status.fallbacks if self._status else ()

    def _loaded(self) -> Facts:
        if self._facts is None:
            detail = self.failure or f"{self.phase}; ask /health/ready"
            raise EngineStopped(f"the model is not loaded: {detail}")
        return self._facts

    def stats(self) -> EngineStats:
        """A snapshot of counts and load; an older one if the engine does not answer soon."""
        with self._changed:
            is_asked = self._status is not None and self._num_asked > self._status.num_answered
            if not self._is_over and not is_asked:
                self._num_asked += 1
                wanted = self._num_asked
                self._tell(Ask())
                self._changed.wait_for(lambda: self._has_answered(wanted), ASK_S)
            return self._status.stats if self._status else NO_STATS

    def _has_answered(self, wanted: int) -> bool:
        return self._is_over or (self._status is not None and self._status.num_answered >= wanted)

    # --- requests, on the event loop

    def submit(self, request: Request) -> RemoteTicket:
        """Hand over a request; call it on the event loop that will read the events.

        Raises EngineStopped unless the engine is ready, Overloaded if the queue is full,
        RequestError if the request could never be carried out.
        """
        facts = self._require_ready()
        check_request(request, facts.config, facts.base.dtype, facts.cache_bytes)
        num_tokens = cost_of(request)
        self._require_place([Waiting(request.key, num_tokens)])
        return self._line.submit(request, num_tokens)

    def require_room(self, num_requests: int, num_tokens: int = 0, key: str = "") -> None:
        """Raise what `submit` would if so many requests, of so many tokens in all, came now.

        To be asked before work is put into them; nothing is reserved.
        """
        self._require_ready()
        wanted = [Waiting(key, 0) for _ in range(num_requests - 1)]
        self._require_place([*wanted, Waiting(key, num_tokens)])

    def _require_ready(self) -> Facts:
        if self.state != "ready":
            raise EngineStopped(f"the engine is {self.state}; no request is accepted")
        return self._loaded()

    def _require_place(self, wanted: list[Waiting]) -> None:
        tickets = self._line.waiting()
        waiting = [Waiting(ticket.request.key, ticket.num_tokens) for ticket in tickets]
        if (text := self._queue_limits.find_refusal(waiting, wanted)) is not None:
            # the first place that is free goes to the first to come: let half of them go
            raise Overloaded(text, self._pace.wait_s(-(-len(waiting) // 2)))

    # --- the end

    def drain(self, timeout_s: float) -> bool:
        """Refuse new requests, finish those accepted, end the process. Blocks.

        False if time ran out, and what was not finished ended with Failed; or if a model was being
        loaded, for which nobody waits any more.
        """
        with self._changed:
            if self.state in ("starting", "loading"):
                timeout_s = 0.0
            if self.state not in ENDED:
                self.state = self.phase = "draining"
            self._is_drained = None
        self._tell(Drain(timeout_s))
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_drained is not None or self._is_over, timeout_s + GRACE_S
            )
            is_drained = bool(self._is_drained)
        self._child.kill()
        self._thread.join(GRACE_S)
        return is_drained

    # --- what the process tells

    def _tell(self, message: Opening | Ask | Drain) -> None:
        with self._sending, suppress(OSError):  # it has gone: who listens finds out
            self._child.control.send(message)

    def _listen(self) -> None:
        """Its own thread: take in what is told, until the process is gone or worth nothing."""
        reason = "what the process of the engine told was not understood"
        try:
            while self._child.control.poll(self._patience_s()):
                self._hear(self._child.control.recv())
            reason = f"the process of the engine told nothing for {self._patience_s():g} s"
            self._child.kill()
        except (EOFError, ConnectionError):
            reason = "the process of the engine ended by itself"
        except (EngineError, OSError) as error:  # of the tokenizer, which it could read
            reason = str(error)
            self._child.kill()
        finally:
            self._finish(reason)

    def _patience_s(self) -> float | None:
        """How long nothing may be heard; None for ever."""
        stall_s = self._options.stall_s
        return stall_s + GRACE_S if stall_s is not None and self.state == "ready" else None

    def _hear(self, news: News) -> None:
        if isinstance(news, Logged):
            _log(news)
            return
        if isinstance(news, Facts):
            self._take_facts(news)
        with self._changed:
            if isinstance(news, Drained):
                self._is_drained = news.is_done
            elif isinstance(news, Status):
                self._take_status(news)
            self._changed.notify_all()

    def _take_facts(self, facts: Facts) -> None:
        """The model is loaded; what of it is needed here is opened before anybody is told."""
        tokenizer = open_tokenizer(self._options.model, facts.config.tokenizer)
        grammar_vocabulary(tokenizer)  # type: ignore[arg-type]  # as all objects it has a hash
        self._tokenizer = tokenizer
        # what adapters hold goes to the device from there
        self._facts = replace(facts, base=replace(facts.base, device=torch.device("cpu")))

    def _take_status(self, status: Status) -> None:
        self._status = status
        progress = self.progress
        if status.total_bytes != progress.total_bytes:
            progress.begin(status.total_bytes)
        if status.read_bytes > progress.read_bytes:
            progress.add(status.read_bytes - progress.read_bytes)
        if status.state == "failed" and self.state != "failed":
            self.failure = status.failure
            self.state = self.phase = "failed"
        if self.state in BEFORE_DRAIN and status.state in BEFORE_DRAIN:
            self.phase = status.phase
            self.state = status.state

    def _finish(self, reason: str) -> None:
        """The process is gone, or goes now; nobody is left waiting."""
        what = self._child.end()
        with self._changed:
            is_expected = self.state in ("draining", *ENDED)
            if not is_expected:
                self.failure = f"{reason}: {what}"
                logger.error("%s", self.failure)
            if self.state not in ENDED:
                self.state = self.phase = "stopped" if is_expected else "failed"
            failure = CUT if self.state == "stopped" else BROKEN
            self._is_over = True
            self._changed.notify_all()
        loop = self._line.loop
        try:
            if loop is not None:
                loop.call_soon_threadsafe(self._line.end, failure)
        except RuntimeError:  # it is closed: nobody listens any more
            self._child.wire.close()
        if loop is None:
            self._child.wire.close()
        with self._sending:
            self._child.control.close()


def _log(news: Logged) -> None:
    """Write a record of the other process as one of ours."""
    record = news.record
    if news.trace is not None:
        record.exc_info = (EngineTraceback, EngineTraceback(f"\n{news.trace}"), None)
    logging.getLogger(record.name).handle(record)
