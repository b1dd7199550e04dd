"""What goes into the engine and what comes back: requests, sampling parameters, events."""

import math
from dataclasses import dataclass, field
from typing import Literal

from engine.errors import RequestError
from offload.pipeline import PipelineStats

FinishReason = Literal["stop", "length", "cancelled"]

MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to end.

    temperature 0 is greedy; top_k 0 and top_p 1 keep everything. `max_tokens` counts generated
    tokens. `seed` None draws a fresh one. `stop` strings end the text and are not part of it.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {self.max_tokens}; it must be at least 1", "max_tokens"
            )
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise RequestError(f"temperature is {self.temperature}; allowed: 0 to 2", "temperature")
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (off) or more", "top_k")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}; allowed: above 0, up to 1", "top_p")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}; it must fit 64 bits", "seed")
        if len(self.stop) > MAX_STOP_STRINGS or "" in self.stop:
            raise RequestError(f"stop takes up to {MAX_STOP_STRINGS} strings, none empty", "stop")


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation: what the encoder reads, and how to go on.

    `num_blanks` 0 continues the text; above 0 the encoder text holds that many sentinels and the
    answers are read between them.
    """

    request_id: str
    encoder_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    num_blanks: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more text; `blank` tells which blank it belongs to (0 when continuing)."""

    text: str
    token_ids: tuple[int, ...]
    blank: int = 0


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request, with its accounts. Times in seconds.

    `experts` counts what offloading did for it; None where all experts are resident.
    """

    reason: FinishReason
    stop_reason: str | int | None
    prompt_tokens: int
    completion_tokens: int
    seed: int
    queued_s: float
    encode_s: float
    decode_s: float
    experts: PipelineStats | None = None


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request that the engine could not carry out."""

    message: str


Event = Piece | Finished | Failed
