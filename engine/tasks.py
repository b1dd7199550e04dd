"""Requests that do not sample: scores, vectors and beam searches, beside the rows that do.

Each goes on by steps of its own once its text is encoded. S source length, D model width.
"""

import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from time import perf_counter

import torch
from torch import Tensor

from engine.batch import ROW_ERRORS
from engine.beam import make_answer, search
from engine.demands import num_rows
from engine.errors import EngineError
from engine.generation import Generation
from engine.model.transformer import Transformer
from engine.request import (
    BeamParams,
    Continuations,
    Embedded,
    Event,
    Failed,
    Finished,
    FinishReason,
    Request,
    Scored,
    Searched,
)
from engine.scoring import MAX_TOKENS, score_encoded
from engine.sources import Source
from engine.tokenizer import Tokenizer
from offload.pipeline import PipelineStats

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a task came to, and how its request ends."""

    event: Event
    reason: FinishReason = "stop"
    stop_reason: str | int | None = None
    completion_tokens: int = 0


Steps = Generator[None, None, Outcome]


@dataclass(slots=True, eq=False)
class Course:
    """A task on its way. Times in seconds; the other fields are those of `batch.Row`."""

    request: Request
    steps: Steps
    own_bytes: int = 0
    queued_s: float = 0.0
    encode_s: float = 0.0
    moved_before: PipelineStats | None = None
    cached_tokens: int = 0
    began: float = field(default_factory=perf_counter)

    @property
    def is_search(self) -> bool:
        """Whether it holds caches, and goes on at every turn."""
        return isinstance(self.request.task, BeamParams)

    def advance(self) -> list[Event]:
        """Go on by a step; returns what came of it, nothing before the end."""
        try:
            next(self.steps)
        except StopIteration as end:
            outcome: Outcome = end.value
            return [outcome.event, self._finished(outcome)]
        return []

    def _finished(self, outcome: Outcome) -> Finished:
        return Finished(
            outcome.reason,
            outcome.stop_reason,
            prompt_tokens=len(self.request.encoder_ids),
            completion_tokens=outcome.completion_tokens,
            seed=self.request.params.seed or 0,
            queued_s=self.queued_s,
            encode_s=self.encode_s,
            decode_s=perf_counter() - self.began,
            cached_tokens=self.cached_tokens,
        )


class Courses:
    """All tasks on their way. In a step each search goes on by a token, and one other task.

    One only: a pass over continuations takes as long as many tokens of the rows beside it.
    """

    def __init__(self, on_error: Callable[[Exception], None] = lambda _: None) -> None:
        self._on_error = on_error
        self._courses: list[Course] = []  # of those that search nothing, the first is next

    def __len__(self) -> int:
        return len(self._courses)

    @property
    def num_rows(self) -> int:
        """Rows that they take of the batch."""
        return sum(num_rows(course.request) for course in self._courses)

    @property
    def nbytes(self) -> int:
        """Bytes of caches of their own, and of texts that they hold."""
        return sum(course.own_bytes for course in self._courses)

    @property
    def held_bytes(self) -> int:
        """Bytes of texts, held by those that search nothing."""
        return sum(course.own_bytes for course in self._courses if not course.is_search)

    def join(self, course: Course) -> None:
        """Take in a task, which goes on with the next step."""
        self._courses.append(course)

    def leave(self, course: Course) -> None:
        """Let a task go whose outcome nobody wants any more."""
        self._courses.remove(course)
        course.steps.close()

    def step(self) -> list[tuple[Course, list[Event]]]:
        """Go on; returns what each may tell. Those that ended, or failed, have left already."""
        others = [course for course in self._courses if not course.is_search]
        turns = [course for course in self._courses if course.is_search] + others[:1]
        outcomes = []
        for course in turns:
            events = self._advance(course)
            self._courses.remove(course)
            if not events:
                self._courses.append(course)
            outcomes.append((course, events))
        return outcomes

    def _advance(self, course: Course) -> list[Event]:
        try:
            return course.advance()
        except EngineError as error:
            self._on_error(error)
            return [Failed(f"the engine could not go on: {error}")]
        except ROW_ERRORS as error:
            self._on_error(error)
            logger.exception("%s failed", course.request.request_id)
            return [Failed(f"the engine could not go on: {type(error).__name__}")]


def start_task(
    model: Transformer,
    tokenizer: Tokenizer,
    request: Request,
    encoded_SD: Tensor,
    max_tokens: int = MAX_TOKENS,
) -> Steps:
    """Begin with the task of a request, whose encoder output (S, D) is without padding.

    Passes over continuations take up to `max_tokens` positions.
    """
    task = request.task
    if isinstance(task, BeamParams):
        return _search(model, tokenizer, request, task, encoded_SD)
    if isinstance(task, Continuations):
        return _score(model, tokenizer, request, task, encoded_SD, max_tokens)
    return _pool(request, encoded_SD)


def _search(
    model: Transformer, tokenizer: Tokenizer, request: Request, task: BeamParams, encoded_SD: Tensor
) -> Steps:
    row = Generation(request, tokenizer, model.config)
    found = yield from search(model, row, encoded_SD.unsqueeze(0), task)
    if not found:
        raise EngineError("the search found no answer that is allowed")
    answers = tuple(make_answer(request, tokenizer, model.config, one) for one in found)
    num_tokens = sum(len(answer.token_ids) for answer in answers)
    return Outcome(Searched(answers), answers[0].reason, answers[0].stop_reason, num_tokens)


def _score(
    model: Transformer,
    tokenizer: Tokenizer,
    request: Request,
    task: Continuations,
    encoded_SD: Tensor,
    max_tokens: int,
) -> Steps:
    most = min(MAX_TOKENS, max_tokens)
    encoded_1SD = encoded_SD.unsqueeze(0)
    scores = yield from score_encoded(model, tokenizer, request, task, encoded_1SD, most)
    return Outcome(Scored(scores))


def _pool(request: Request, encoded_SD: Tensor) -> Steps:
    yield from ()
    return Outcome(Embedded(tuple(pool(request.source, encoded_SD).tolist())))


def pool(source: Source, encoded_SD: Tensor) -> Tensor:
    """The mean (D,) of an encoder output over the tokens of the text, its end mark included, fp32.

    The vectors of an adapter do not count, other than through what the tokens made of them.
    Raises EngineError if it is not finite.
    """
    is_text_S = torch.ones(source.num_positions, dtype=torch.bool)
    is_text_S[source.vector_positions()] = False
    mean_D = encoded_SD[is_text_S.to(encoded_SD.device)].float().mean(0)
    if not bool(torch.isfinite(mean_D).all()):
        raise EngineError("the model gave numbers that are not finite")
    return mean_D
