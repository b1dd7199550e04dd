"""What goes into the engine and what comes back: requests, sampling parameters, events."""

from dataclasses import dataclass, field
from typing import Literal

from engine.adapters import Adapter
from engine.errors import RequestError
from engine.sources import Source
from offload.pipeline import PipelineStats

FinishReason = Literal["stop", "length", "cancelled"]

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to end.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and typical_p 1 keep everything; penalties of
    1 (repetition) and 0 change nothing. `logit_bias` is added to scores, by token id;
    `allowed_token_ids`, if there are any, are the only ones that may come. `max_tokens` counts
    generated tokens; before `min_tokens` only a stop string ends the text, and with `ignore_eos`
    the model's own end never does. `seed` None draws a fresh one. `stop` strings and
    `stop_token_ids` end the text and are not part of it. `logprobs` asks for the log-probability of
    each token and of so many of the likeliest.
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
    stop_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False
    logprobs: int | None = None

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
        if not 0 <= self.min_tokens <= self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}; allowed: 0 to max_tokens {self.max_tokens}",
                "min_tokens",
            )
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise RequestError(
                f"logprobs is {self.logprobs}; allowed: 0 to {MAX_LOGPROBS}", "logprobs"
            )
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
    "repetition_penalty": (0.01, 10, None),  # scores over less might overflow
    "presence_penalty": (-2, 2, None),
    "frequency_penalty": (-2, 2, None),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation: what the encoder reads, and how to go on.

    `num_blanks` 0 continues the text; above 0 the encoder text holds that many sentinels and the
    answers are read between them. `adapter` is the soft prompt itself and not its name: a new
    version changes nothing for a request that is on its way.
    """

    request_id: str
    encoder_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    num_blanks: int = 0
    adapter: Adapter | None = None

    @property
    def source(self) -> Source:
        """All that the encoder reads."""
        return Source(self.encoder_ids, self.adapter)


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """How likely the model found a chosen token, and its likeliest ones, before any sampling.

    Natural logarithms; `top` is sorted, and the chosen token may or may not be in it.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more text; `blank` tells which blank it belongs to (0 when continuing).

    `logprobs` are those of `token_ids`, where they were asked for; the token that ended the text
    has one as well.
    """

    text: str
    token_ids: tuple[int, ...]
    blank: int = 0
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request, with its accounts. Times in seconds.

    `experts` counts what was moved while it ran, shared with those that ran beside it; None where
    all experts are resident.
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
    """The end of a request that the engine could not carry out.

    `is_shutdown`: for want of time only; another server, or this one when it is back, may do it.
    """

    message: str
    is_shutdown: bool = False


Event = Piece | Finished | Failed
