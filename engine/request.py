"""What goes into the engine and what comes back: requests, sampling parameters, events."""

from dataclasses import dataclass, field
from typing import Literal

from engine.errors import RequestError
from offload.pipeline import PipelineStats

FinishReason = Literal["stop", "length", "cancelled"]

MAX_STOP_STRINGS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to end.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and typical_p 1 keep everything; penalties of
    1 (repetition) and 0 change nothing. `logit_bias` is added to scores, by token id. `max_tokens`
    counts generated tokens. `seed` None draws a fresh one. `stop` strings end the text and are not
    part of it.
    """

    max_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()

    @property
    def has_penalties(self) -> bool:
        """Whether the choice depends on what the row holds already."""
        neutral = (1.0, 0.0, 0.0)
        given = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return given != neutral

    def __post_init__(self) -> None:
        self._check_bounds()
        if self.max_tokens < 1:
            raise RequestError(
                f"max_tokens is {self.max_tokens}; it must be at least 1", "max_tokens"
            )
        if self.top_k < 0:
            raise RequestError(f"top_k is {self.top_k}; it must be 0 (off) or more", "top_k")
        for token_id, bias in self.logit_bias:
            if token_id < 0 or not -100 <= bias <= 100:
                raise RequestError(
                    f"logit_bias {token_id}: {bias}; ids are 0 or more, biases -100 to 100",
                    "logit_bias",
                )
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}; it must fit 64 bits", "seed")
        if len(self.stop) > MAX_STOP_STRINGS or "" in self.stop:
            raise RequestError(f"stop takes up to {MAX_STOP_STRINGS} strings, none empty", "stop")

    def _check_bounds(self) -> None:
        for name, (low, high, excluded) in BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high or value == excluded:  # NaN is in no range
                above = "above " if excluded == low else ""
                raise RequestError(f"{name} is {value}; allowed: {above}{low} to {high}", name)


BOUNDS: dict[str, tuple[float, float, float | None]] = {  # lowest, highest, and what is out again
    "temperature": (0, 2, None),
    "top_p": (0, 1, 0),
    "min_p": (0, 1, None),
    "typical_p": (0, 1, 0),
    "repetition_penalty": (0, 10, 0),
    "presence_penalty": (-2, 2, None),
    "frequency_penalty": (-2, 2, None),
}


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
