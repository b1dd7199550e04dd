"""What goes into the engine and what comes back: requests, sampling parameters, events."""

from dataclasses import dataclass, field
from typing import Literal

from engine.adapters import Adapter
from engine.errors import RequestError
from engine.grammar import Grammar
from engine.sources import Source
from offload.pipeline import PipelineStats

FinishReason = Literal["stop", "length", "cancelled"]  # at its deadline: length, "timeout"

MAX_STOP_STRINGS = 16
MAX_LOGPROBS = 20
MAX_BEAMS = 32
MAX_BAD_WORDS = 1024
MAX_BAD_WORD_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen and when to end.

    temperature 0 is greedy; top_k 0, top_p 1, min_p 0 and typical_p 1 keep everything; penalties of
    1 (repetition) and 0 change nothing. `logit_bias` is added to scores, by token id;
    `allowed_token_ids`, if there are any, are the only ones that may come. `max_tokens` counts
    generated tokens; before `min_tokens` only a stop string ends the text, and with `ignore_eos`
    the model's own end never does. `seed` None draws a fresh one. `stop` strings and
    `stop_token_ids` end the text and are not part of it, unless `include_stop`. None of the
    sequences of ids in `bad_words` may come. `logprobs` asks for the log-probability of each token
    and of so many of the likeliest, `prompt_logprobs` for those of the request's `decoder_ids`.
    With a `grammar` the text follows it, unless a stop string, a stop id or `max_tokens` cuts it
    short; the model's own end comes only where it may end, and it ends where nothing may follow.
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
    prompt_logprobs: int | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    include_stop: bool = False
    grammar: Grammar | None = None

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
        for name in ("logprobs", "prompt_logprobs"):
            number = getattr(self, name)
            if number is not None and not 0 <= number <= MAX_LOGPROBS:
                raise RequestError(f"{name} is {number}; allowed: 0 to {MAX_LOGPROBS}", name)
        self._check_words()

    def _check_words(self) -> None:
        longest = MAX_BAD_WORD_TOKENS
        is_fitting = all(1 <= len(ids) <= longest for ids in self.bad_words)
        if len(self.bad_words) > MAX_BAD_WORDS or not is_fitting:
            text = f"bad_words takes up to {MAX_BAD_WORDS} rows of 1 to {longest} tokens"
            raise RequestError(text, "bad_words")
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
class BeamParams:
    """How to search. A hypothesis scores its log-probability over its length ** length_penalty.

    Above 0 the penalty favours long answers. With `stops_early` the search ends as soon as there
    are `num_beams` complete answers; else when no open beam can beat the worst of them any more.
    """

    num_beams: int = 4
    length_penalty: float = 1.0
    stops_early: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_beams <= MAX_BEAMS:
            raise RequestError(
                f"num_beams is {self.num_beams}; allowed: 1 to {MAX_BEAMS}", "num_beams"
            )
        if not -10 <= self.length_penalty <= 10:  # NaN is in no range
            raise RequestError(
                f"length_penalty is {self.length_penalty}; allowed: -10 to 10", "length_penalty"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Continuations:
    """Score these, as ids, instead of generating; `top` of the likeliest at each place as well."""

    choices: tuple[tuple[int, ...], ...]
    top: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Pooling:
    """Tell one vector of the encoder's output, its mean, instead of generating."""


Task = BeamParams | Continuations | Pooling


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One piece of work: what the encoder reads, and how to go on; by sampling, without a `task`.

    `num_blanks` 0 continues the text; above 0 the encoder text holds that many sentinels and the
    answers are read between them. `adapter` is the soft prompt itself and not its name: a new
    version changes nothing for a request that is on its way. `decoder_ids` is what the answer
    begins with, given and not generated. `key` is on whose account it runs, `priority` above
    another's goes first, `deadline_s` after its arrival it ends, whatever it has come to. With a
    `salt` the encoder's output may be kept for requests of the same salt. Of a decoder-only model
    `encoder_ids` are the prompt, whose last `num_held` ids are read step by step, so that their
    states tell what comes next.
    """

    request_id: str
    encoder_ids: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)
    num_blanks: int = 0
    adapter: Adapter | None = None
    decoder_ids: tuple[int, ...] = ()
    task: Task | None = None
    key: str = ""
    priority: int = 0
    deadline_s: float | None = None
    salt: str | None = None
    num_held: int = 0

    def __post_init__(self) -> None:
        if self.num_blanks and self.decoder_ids:
            text = "blanks are filled from their start; put what is known into the prompt"
            raise RequestError(text, "decoder_prompt")
        if self.num_blanks and self.params.grammar is not None:
            raise RequestError("a grammar is for a text to continue, not for blanks", "grammar")
        strict = {"grammar": self.params.grammar, "bad_words": self.params.bad_words}
        for name, value in strict.items():
            if value and isinstance(self.task, BeamParams):
                raise RequestError(f"beam search takes no {name}; leave one of them out", name)

    @property
    def source(self) -> Source:
        """All that the encoder reads, or a decoder-only model before its first step."""
        if not self.num_held:
            return Source(self.encoder_ids, self.adapter)
        return Source(self.encoder_ids[: -self.num_held], self.adapter)

    @property
    def num_prompt_positions(self) -> int:
        """Positions of the whole prompt and of its adapter's vectors, read at first or held."""
        return self.source.num_positions + self.num_held


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
class Score:
    """Log-probabilities (nats) of the tokens of a choice, each given those before it.

    `is_greedy` tells whether each of them was the likeliest. `tokens` is there where the likeliest
    were asked for.
    """

    logprobs: tuple[float, ...]
    is_greedy: bool
    tokens: tuple[TokenLogprob, ...] = ()

    @property
    def total(self) -> float:
        """Of the whole choice."""
        return sum(self.logprobs)

    @property
    def mean(self) -> float:
        """Per token: what perplexity is made of, so that long choices are not worse for it."""
        return self.total / len(self.logprobs)


@dataclass(frozen=True, slots=True)
class PromptLogprobs:
    """How likely the model found `decoder_ids`, before the first piece; where it was asked for."""

    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Scored:
    """What `Continuations` asked for, choice by choice."""

    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class Embedded:
    """What `Pooling` asked for: a vector of the model's width."""

    vector: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a beam search: its text, its ids with the end mark, its score."""

    text: str
    token_ids: tuple[int, ...]
    score: float
    reason: FinishReason
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Searched:
    """What `BeamParams` asked for, best first."""

    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of a request, with its accounts. Times in seconds.

    `experts` counts what was moved while it ran, shared with those that ran beside it; None where
    all experts are resident. Of its prompt's tokens, `cached_tokens` had been encoded before. What
    a task made is counted by its tokens: those of all answers of a beam search, none of a score.
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
    cached_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Failed:
    """The end of a request that the engine could not carry out.

    `is_shutdown`: for want of time only; another server, or this one when it is back, may do it.
    `is_late`: its deadline passed before there was a first token.
    """

    message: str
    is_shutdown: bool = False
    is_late: bool = False


Event = Piece | PromptLogprobs | Scored | Embedded | Searched | Finished | Failed
