"""Jobs on their way through the encoder, and what each has cost when it joins those that decode."""

from collections.abc import Generator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Generic, NamedTuple, Protocol, TypeVar

from torch import Tensor

from engine.batch import Row
from engine.request import Request
from engine.sources import Source
from engine.tasks import Course
from offload.pipeline import PipelineStats


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
Member = Row | Course


class Accounts(NamedTuple):
    """What a request has cost before it joined. Times in seconds."""

    queued_s: float
    encode_s: float
    moved_before: PipelineStats | None
    cached_tokens: int = 0

    def write(self, member: Member) -> None:
        """Let a row or a task tell it at its end."""
        member.queued_s, member.encode_s = self.queued_s, self.encode_s
        member.moved_before, member.cached_tokens = self.moved_before, self.cached_tokens


@dataclass(slots=True)
class Sweep(Generic[J]):
    """Texts on their way through the encoder, each text once, however many jobs read it."""

    jobs: list[J]
    texts: list[Source]
    layers: Generator[None, None, Tensor]
    moved_before: PipelineStats | None
    cached_tokens: int = 0
    began: float = field(default_factory=perf_counter)

    @property
    def num_tokens(self) -> int:
        """Positions of the texts with their padding."""
        return len(self.texts) * max(text.num_positions for text in self.texts)
