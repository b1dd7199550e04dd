"""The engine: texts go through the encoder in sweeps, rows decode in a batch, turn by turn."""

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from time import perf_counter
from typing import Generic

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from engine.batch import ROW_ERRORS, Batch, Row, make_row
from engine.demands import check_request, held_bytes, make_demand, search_bytes
from engine.errors import EngineError
from engine.model.transformer import Transformer
from engine.pressure import Pressure
from engine.request import Event, Failed, Finished, Request
from engine.room import Room
from engine.scheduler import Demand, Limits, Scheduler
from engine.sources import encode_layers, go_on_layers
from engine.stats import CacheStats, WorkStats
from engine.sweep import Accounts, J, Member, Sweep
from engine.tasks import Course, Courses, start_task
from engine.tokenizer import Tokenizer
from offload.pipeline import PipelineStats

logger = logging.getLogger(__name__)


class Engine(Generic[J]):
    """Carries out requests together. For one thread; `turn` is the whole of it.

    `moved` tells what was counted of offloaded experts so far. `noted` is when it was last known to
    go on: a turn notes each of its parts.
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
        self.scheduler: Scheduler[J] = Scheduler(limits)
        self._pressure = Pressure(self.scheduler)
        self._room = Room(model, limits, self._pressure.note)
        self._jobs: dict[Member, J] = {}
        self._sweep: Sweep[J] | None = None
        self._retries: deque[J] = deque()  # alone: those that failed together, for one
        self._step_s = 0.0  # that the last step of the batch took; 0: there was no row
        self.noted = perf_counter()
        self.work = WorkStats()

    @property
    def _batch(self) -> Batch:
        return self._room.batch

    @property
    def _courses(self) -> Courses:
        return self._room.courses

    @property
    def known(self) -> CacheStats:
        """What is kept of the encoder's outputs."""
        return self._room.known.stats

    @property
    def running(self) -> int:
        """Requests that are being encoded or decoded."""
        sweep = self._sweep  # other threads ask, and it may end meanwhile
        encoding = len(self._retries) + (len(sweep.jobs) if sweep else 0)
        return len(self._batch) + len(self._courses) + encoding

    def num_waiting(self) -> int:
        """Requests that wait to be begun and that somebody waits for."""
        return self.scheduler.count(lambda job: not job.is_cancelled())

    def check(self, request: Request) -> None:
        """Raise RequestError if a request could never be carried out. For any thread."""
        dtype = self._model.embedding.weight.dtype
        check_request(request, self._model.config, dtype, self.scheduler.limits.cache_bytes)

    def add(self, job: J) -> None:
        """Queue a request, which `check` has let pass."""
        self.scheduler.add(make_demand(job.request, self._model, job.submitted), job)

    @torch.inference_mode()
    def turn(self) -> list[tuple[J, Event]]:
        """Let in, go on by some layers of the encoder and a token of each row; say what happened.

        Beam searches go on by a token as well, and one other task by a pass. Each job's last event
        is Finished or Failed; a job that is cancelled has no more events.
        Raises DeviceLost if nothing more can be computed.
        """
        self.noted = perf_counter()
        self._forget_cancelled()
        told = self._end_late(self.noted)
        told += self._join_known()
        told += self._begin_sweep()
        told += self._encode()
        told += self._step()
        told += self._tell(self._courses.step())
        self._pressure.adapt()
        return told

    def _encode(self) -> list[tuple[J, Event]]:
        """Go on with the sweep by a layer, and by more for as long as a step of the rows takes.

        So a running stream waits twice as long at most, and who is new does not wait for a step
        after each layer: of a short text a layer takes a tenth of a step.
        """
        began, told = perf_counter(), self._encode_layer()
        while self._sweep is not None and perf_counter() - began < self._step_s:
            self.noted = perf_counter()
            told += self._encode_layer()
        return told

    def _step(self) -> list[tuple[J, Event]]:
        """A token of each row."""
        self.noted = perf_counter()
        num_rows = len(self._batch)
        self.work = self.work.with_step(num_rows)
        told = self._tell(self._batch.step(self.scheduler.max_rows))
        began, self.noted = self.noted, perf_counter()
        self._step_s = self.noted - began if num_rows else 0.0
        return told

    # --- who leaves early

    def _forget_cancelled(self) -> None:
        self.scheduler.drop(lambda _, job: job.is_cancelled())
        self._drop_unencoded(lambda job: job.is_cancelled())
        for member, job in list(self._jobs.items()):
            if job.is_cancelled():
                self._leave(member)

    def _end_late(self, now: float) -> list[tuple[J, Event]]:
        """End those whose deadline has passed: rows with what they have, others with nothing."""

        def is_late(job: J) -> bool:
            deadline_s = job.request.deadline_s
            return deadline_s is not None and job.submitted + deadline_s <= now

        late = self.scheduler.drop(lambda _, job: is_late(job))
        late += self._drop_unencoded(is_late)
        told: list[tuple[J, Event]] = []
        for member, job in [(m, j) for m, j in self._jobs.items() if is_late(j)]:
            if isinstance(member, Row):
                told += [(job, event) for event in self._cut_short(member)]
            else:
                late.append(job)
            self._leave(member)
        for job in late:
            text = f"the deadline of {job.request.deadline_s:g} s passed before there was an answer"
            told.append((job, Failed(text, is_late=True)))
        return told

    def _cut_short(self, row: Row) -> list[Event]:
        try:
            return [self._with_moved(row, event) for event in row.cut_short("timeout")]
        except ROW_ERRORS as error:
            return [_failed(error)]

    def _drop_unencoded(self, is_unwanted: Callable[[J], bool]) -> list[J]:
        """Take out those that are being encoded; a sweep that nobody waits for ends."""
        sweep = self._sweep
        dropped = [job for job in self._retries if is_unwanted(job)]
        self._retries = deque(job for job in self._retries if not is_unwanted(job))
        if sweep is not None:
            dropped += [job for job in sweep.jobs if is_unwanted(job)]
            sweep.jobs = [job for job in sweep.jobs if not is_unwanted(job)]
            if not sweep.jobs:
                self._sweep = None
        return dropped

    def _leave(self, member: Member) -> None:
        if isinstance(member, Row):
            self._batch.leave(member)
        else:
            self._courses.leave(member)
        del self._jobs[member]

    # --- who comes in

    def _unencoded(self) -> list[Demand]:
        """Of those that are let in but have no place yet."""
        jobs = [*self._retries, *(self._sweep.jobs if self._sweep else ())]
        return [make_demand(job.request, self._model) for job in jobs]

    def _num_rows(self) -> int:
        """Rows that are taken or promised."""
        promised = sum(demand.rows for demand in self._unencoded())
        return len(self._batch) + self._courses.num_rows + promised

    def _has_room(self, demands: list[Demand]) -> bool:
        return self._room.admits(self._unencoded(), demands)

    def _join_known(self) -> list[tuple[J, Event]]:
        """Let in those whose turn it is and whose texts were encoded before."""
        known = self._room.known
        if not len(known):
            return []
        jobs = self.scheduler.next_ready(
            self._num_rows(), self._has_room, lambda job: known.knows(job.request)
        )
        # to let one in may have taken the bytes in which its text was kept
        self._retries += [job for job in jobs if not known.knows(job.request)]
        return self._join_from_cache([job for job in jobs if known.knows(job.request)])

    def _join_from_cache(self, jobs: list[J]) -> list[tuple[J, Event]]:
        if not jobs:
            return []
        now, moved = perf_counter(), self._moved()
        members = []
        try:
            encoded_BSD = self._find_known(jobs)
        except ROW_ERRORS as error:  # each goes alone then
            self._pressure.note(error)
            if len(jobs) > 1:
                self._retries += jobs
                return []
            logger.exception("%s failed at its start", jobs[0].request.request_id)
            return [(jobs[0], _failed(error))]
        for job in jobs:
            accounts = Accounts(now - job.submitted, 0.0, moved, len(job.request.source.ids))
            members.append((job, accounts))
        return self._join(members, encoded_BSD, list(range(len(members))))

    def _find_known(self, jobs: list[J]) -> Tensor:
        """What was kept for jobs, with padding."""
        outputs = []
        for job in jobs:
            encoded_SD = self._room.known.find(job.request)
            assert encoded_SD is not None
            outputs.append(encoded_SD)
        return pad_sequence(outputs, batch_first=True)

    def _begin_sweep(self) -> list[tuple[J, Event]]:
        """Begin with the next texts, if none are being read; some may turn out to be known."""
        if self._sweep is not None:
            return []
        jobs = [self._retries.popleft()] if self._retries else self._next_sweep()
        known = self._room.known
        unknown = [job for job in jobs if not known.knows(job.request)]
        ready = [job for job in jobs if known.knows(job.request)]
        unknown = self._go_on(unknown)
        if unknown:
            for job in unknown:
                known.find(job.request)  # is counted: as missed
            texts = list(dict.fromkeys(job.request.source for job in unknown))
            self._sweep = Sweep(unknown, texts, encode_layers(self._model, texts), self._moved())
            num_tokens = sum(text.num_positions for text in texts)
            self.work = self.work.with_sweep(len(texts), num_tokens)
        return self._join_from_cache(ready)

    def _go_on(self, unknown: list[J]) -> list[J]:
        """Of texts that begin with one that was read, read the rest, alone; returns the others.

        A batch-invariant answer may not depend on what was read before.
        """
        if not self._model.config.is_decoder_only or self._model.is_invariant:
            return unknown
        begun = [(job, self._room.known.begun(job.request)) for job in unknown]
        others = [job for job, part in begun if part is None]
        more = [(job, part) for job, part in begun if part is not None]
        if others or not more:
            self._retries += [job for job, _ in more]
            return others
        (job, part), *later = more
        self._retries += [job for job, _ in later]
        source = job.request.source
        self._room.known.count_begun(part)
        layers = go_on_layers(self._model, source, part)
        self._sweep = Sweep([job], [source], layers, self._moved(), part.num_ids)
        self.work = self.work.with_sweep(1, len(source.ids) - part.num_ids)
        return []

    def _next_sweep(self) -> list[J]:
        return self.scheduler.next_sweep(perf_counter(), self._num_rows(), self._has_room)

    def _encode_layer(self) -> list[tuple[J, Event]]:
        """Go on with the sweep; when it is through, its jobs join the batch."""
        sweep = self._sweep
        if sweep is None:
            return []
        try:
            next(sweep.layers)
        except StopIteration as end:
            encoded_BSD: Tensor = end.value
        except ROW_ERRORS as error:
            self._pressure.note(error, sweep)
            self._sweep = None
            if len(sweep.jobs) > 1:
                self._retries += sweep.jobs
                return []
            logger.exception("%s failed in the encoder", sweep.jobs[0].request.request_id)
            text = f"the engine could not read the prompt: {type(error).__name__}"
            return [(sweep.jobs[0], Failed(text))]
        else:
            return []
        # Not in `except`: a failure from here on would be logged with all that the encoder made.
        self._sweep = None
        return self._end_sweep(sweep, encoded_BSD)

    def _end_sweep(self, sweep: Sweep[J], encoded_BSD: Tensor) -> list[tuple[J, Event]]:
        encode_s = perf_counter() - sweep.began
        members, which = [], []
        for job in sweep.jobs:
            queued_s = sweep.began - job.submitted
            accounts = Accounts(queued_s, encode_s, sweep.moved_before, sweep.cached_tokens)
            members.append((job, accounts))
            which.append(sweep.texts.index(job.request.source))
            source = job.request.source.num_positions
            self._keep(job.request, encoded_BSD[which[-1], :source])
        return self._join(members, encoded_BSD, which)

    def _keep(self, request: Request, encoded_SD: Tensor) -> None:
        """Keep an output for others; without memory for a copy this one still has it."""
        try:
            self._room.keep(request, encoded_SD)
        except ROW_ERRORS as error:
            self._pressure.note(error)

    def _join(
        self, members: list[tuple[J, Accounts]], encoded_BSD: Tensor, which: list[int]
    ) -> list[tuple[J, Event]]:
        """Let jobs go on with what the encoder made of their texts; job i reads `which[i]`."""
        told: list[tuple[J, Event]] = []
        rows: list[Row] = []
        places: list[int] = []
        for (job, accounts), place in zip(members, which, strict=True):
            try:
                member = self._make_member(job.request, encoded_BSD[place])
            except ROW_ERRORS as error:
                self._pressure.note(error)
                logger.exception("%s failed at its start", job.request.request_id)
                told.append((job, _failed(error)))
                continue
            accounts.write(member)
            self._jobs[member] = job
            if isinstance(member, Row):
                rows.append(member)
                places.append(place)
            else:
                self._courses.join(member)
        if rows:
            told += self._tell(self._batch.join(rows, encoded_BSD, places))
        return told

    def _make_member(self, request: Request, encoded_SD: Tensor) -> Member:
        if request.task is None:
            return make_row(request, self._model, self._tokenizer)
        # a copy: a view would keep the texts of the whole sweep
        encoded_SD = encoded_SD[: request.source.num_positions].clone()
        most = self.scheduler.max_sweep_tokens
        steps = start_task(self._model, self._tokenizer, request, encoded_SD, most)
        own_bytes = search_bytes(request, self._model) or held_bytes(request, self._model)
        return Course(request, steps, own_bytes)

    # --- what is told, and what went wrong

    def _with_moved(self, member: Member, event: Event) -> Event:
        """At the end, add what was moved of experts meanwhile, for it and those beside it."""
        now = self._moved()
        if not isinstance(event, Finished) or now is None or member.moved_before is None:
            return event
        return replace(event, experts=now - member.moved_before)

    def _tell(self, outcomes: Iterable[tuple[Member, list[Event]]]) -> list[tuple[J, Event]]:
        told = []
        for member, events in outcomes:
            job = self._jobs[member]
            told += [(job, self._with_moved(member, event)) for event in events]
            if events and isinstance(events[-1], Finished | Failed):
                del self._jobs[member]
        return told


def _failed(error: Exception) -> Failed:
    detail = str(error) if isinstance(error, EngineError) else type(error).__name__
    return Failed(f"the engine could not go on: {detail}")
