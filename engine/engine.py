"""The engine: texts go through the encoder in sweeps, rows decode in a batch, turn by turn."""

import logging
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from engine.batch import ROW_ERRORS, Batch, Row, make_row
from engine.model.transformer import Transformer
from engine.request import Event, Failed, Finished, Request
from engine.scheduler import Demand, Limits, Scheduler
from engine.sources import Source, encode_layers
from engine.tokenizer import Tokenizer
from offload.pipeline import PipelineStats

logger = logging.getLogger(__name__)


class Job(Protocol):
    """A request in the engine. `submitted` is the time of its arrival, of `perf_counter`."""

    @property
    def request(self) -> Request: ...
    @property
    def submitted(self) -> float: ...

    def is_cancelled(self) -> bool:
        """Whether nobody waits for it any more."""
        ...


J = TypeVar("J", bound=Job)


@dataclass(slots=True)
class Sweep(Generic[J]):
    """Texts on their way through the encoder, each text once, however many jobs read it."""

    jobs: list[J]
    texts: list[Source]
    layers: Generator[None, None, Tensor]
    moved_before: PipelineStats | None
    began: float = field(default_factory=perf_counter)


class Engine(Generic[J]):
    """Carries out requests together. For one thread; `turn` is the whole of it.

    `moved` tells what was counted of offloaded experts so far.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        limits: Limits,
        moved: Callable[[], PipelineStats | None] = lambda: None,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._moved = moved
        self._batch = Batch(model, limits.cache_bytes)
        self._jobs: dict[Row, J] = {}
        self._sweep: Sweep[J] | None = None
        self._retries: deque[J] = deque()  # texts that failed together go again alone
        self.scheduler: Scheduler[J] = Scheduler(limits)

    @property
    def running(self) -> int:
        """Requests that are being encoded or decoded."""
        sweep = self._sweep  # other threads ask, and it may end meanwhile
        return len(self._batch) + len(self._retries) + (len(sweep.jobs) if sweep else 0)

    def num_waiting(self) -> int:
        """Requests that wait to be begun and that somebody waits for."""
        return self.scheduler.count(lambda job: not job.is_cancelled())

    def add(self, job: J) -> None:
        """Queue a request."""
        request = job.request
        demand = Demand(
            source_tokens=request.source.num_positions,
            max_tokens=request.params.max_tokens,
            arrived=job.submitted,
            key=request.adapter.name if request.adapter else "",
        )
        self.scheduler.add(demand, job)

    @torch.inference_mode()
    def turn(self) -> list[tuple[J, Event]]:
        """Let in, go on by one layer of the encoder and one token of each row; say what happened.

        Each job's last event is Finished or Failed; a job that is cancelled has no more events.
        """
        self._forget_cancelled()
        self._begin_sweep()
        told = self._encode_layer()
        return told + self._tell(self._batch.step())

    def _forget_cancelled(self) -> None:
        self.scheduler.drop(lambda _, job: job.is_cancelled())
        self._retries = deque(job for job in self._retries if not job.is_cancelled())
        if self._sweep is not None and all(job.is_cancelled() for job in self._sweep.jobs):
            self._sweep = None
        for row, job in list(self._jobs.items()):
            if job.is_cancelled():
                self._batch.leave(row)
                del self._jobs[row]

    def _begin_sweep(self) -> None:
        if self._sweep is not None:
            return
        if self._retries:
            jobs = [self._retries.popleft()]
        else:
            jobs = self.scheduler.next_sweep(perf_counter(), self.running, self._has_room)
        if not jobs:
            return
        texts = list(dict.fromkeys(job.request.source for job in jobs))
        self._sweep = Sweep(jobs, texts, encode_layers(self._model, texts), self._moved())

    def _has_room(self, demands: list[Demand]) -> bool:
        sources = [demand.source_tokens for demand in demands]
        return self._batch.has_room(sources, [demand.max_tokens for demand in demands])

    def _encode_layer(self) -> list[tuple[J, Event]]:
        """Go on with the sweep; when it is through, its jobs join the batch."""
        sweep = self._sweep
        if sweep is None:
            return []
        try:
            next(sweep.layers)
        except StopIteration as end:
            self._sweep = None
            return self._join(sweep, end.value)
        except ROW_ERRORS as error:
            self._sweep = None
            if len(sweep.jobs) > 1:
                self._retries += sweep.jobs
                return []
            logger.exception("%s failed in the encoder", sweep.jobs[0].request.request_id)
            text = f"the engine could not read the prompt: {type(error).__name__}"
            return [(sweep.jobs[0], Failed(text))]
        return []

    def _join(self, sweep: Sweep[J], encoded_BSD: Tensor) -> list[tuple[J, Event]]:
        encode_s = perf_counter() - sweep.began
        rows, which = [], []
        for job in sweep.jobs:
            if job.is_cancelled():
                continue
            row = make_row(job.request, self._model, self._tokenizer)
            row.queued_s, row.encode_s = sweep.began - job.submitted, encode_s
            row.moved_before = sweep.moved_before
            self._jobs[row] = job
            rows.append(row)
            which.append(sweep.texts.index(job.request.source))
        return self._tell(self._batch.join(rows, encoded_BSD, which)) if rows else []

    def _with_moved(self, row: Row, event: Event) -> Event:
        """At the end, add what was moved of experts meanwhile, for this row and those beside it."""
        now = self._moved()
        if not isinstance(event, Finished) or now is None or row.moved_before is None:
            return event
        return replace(event, experts=now - row.moved_before)

    def _tell(self, outcomes: list[tuple[Row, list[Event]]]) -> list[tuple[J, Event]]:
        told = []
        for row, events in outcomes:
            job = self._jobs[row]
            told += [(job, self._with_moved(row, event)) for event in events]
            if events and isinstance(events[-1], Finished | Failed):
                del self._jobs[row]
        return told
