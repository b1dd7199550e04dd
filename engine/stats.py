"""What a worker counts."""

from dataclasses import dataclass
from typing import NamedTuple

from offload.pipeline import PipelineStats


class CacheStats(NamedTuple):
    """Texts that were found and that were not, since the start; bytes that are kept now.

    Of `partial_hits` only the beginning was found. `hit_tokens` are those of texts that needed not
    be read again, whole or in part.
    """

    hits: int
    misses: int
    nbytes: int
    partial_hits: int = 0
    hit_tokens: int = 0


class WorkStats(NamedTuple):
    """What was done together since the start.

    Steps of the decoder's batch, and the rows of all of them; sweeps of the encoder, and the texts
    and tokens of all of them.
    """

    steps: int = 0
    rows: int = 0
    sweeps: int = 0
    texts: int = 0
    tokens: int = 0

    def with_step(self, rows: int) -> "WorkStats":
        """And one step more, unless there was nothing to decode."""
        return self._replace(steps=self.steps + 1, rows=self.rows + rows) if rows else self

    def with_sweep(self, texts: int, tokens: int) -> "WorkStats":
        """And one sweep more."""
        return self._replace(
            sweeps=self.sweeps + 1, texts=self.texts + texts, tokens=self.tokens + tokens
        )


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Counts since the start, and the present load.

    `requests` have finished; each accepted one is counted in one of `requests`, `cancelled` and
    `failed` in the end. `max_rows` may decode together, fewer than the limit after memory ran out.
    `stalled_s` is how long the present step has been going on.
    """

    queued: int
    queued_tokens: int
    running: int
    requests: int
    cancelled: int
    failed: int
    prompt_tokens: int
    completion_tokens: int
    max_rows: int
    stalled_s: float
    encoder_cache: CacheStats
    experts: PipelineStats | None  # None: all experts are resident
    work: WorkStats = WorkStats()
