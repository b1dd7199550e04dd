"""Fields of bodies that ask for text, the same for every such route, and what they come to."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import Field, JsonValue

from engine.request import MAX_BEAMS, BeamParams, SamplingParams
from server.errors import ApiError
from server.schemas import (
    MAX_INT32,
    MAX_INT64,
    MAX_NAMED_FIELDS,
    BadWords,
    Body,
    LogitBias,
    NamedIds,
    RoutedBody,
    SafeName,
    Stop,
    Text,
)

MAX_CHOICE_TEXTS = 1000
DEFAULT_BEAMS = 4

# What beam search does not do, each with the values that ask for nothing.
NOT_WITH_BEAMS: dict[str, tuple[object, ...]] = {
    "temperature": (0, 1),
    "top_p": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "top_logprobs": (),
    "prompt_logprobs": (),
    "best_of": (),
    "fill": (False,),
    "response_format": (),
    "structured_outputs": (),
    "stream": (False,),
}
ONLY_WITH_BEAMS: dict[str, object] = {"num_beams": 1, "length_penalty": 1, "early_stopping": False}


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = Field(default=False, description="Send a last chunk with the usage.")
    continuous_usage_stats: bool = Field(
        default=False, description="Tell the usage so far in each chunk (extension)."
    )


class JsonSchema(Body):
    """The JSON schema of a response format."""

    name: Text | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    """The form of the answer, as OpenAI's clients ask for it."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class StructuredOutputs(Body):
    """The form of the answer in one of several ways; exactly one is to be given."""

    json_: dict[str, JsonValue] | Text | None = Field(default=None, alias="json")
    regex: Text | None = None
    choice: Annotated[list[Text], Field(min_length=1, max_length=MAX_CHOICE_TEXTS)] | None = None
    grammar: Text | None = None
    json_object: Literal[True] | None = None


def bad_field(text: str, param: str, code: str = "invalid_value") -> ApiError:
    """A 400 that names a field."""
    return ApiError(400, text, code=code, param=param)


class GenerationBody(RoutedBody):
    """What every route that makes text understands. Null means absent for every field."""

    temperature: float = Field(
        default=1.0, ge=0, le=2, description="0 always takes the likeliest token; 1 unless given."
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="Share of probability to keep.")
    top_k: int = Field(
        default=0, ge=-1, le=MAX_INT32, description="Tokens to keep; 0 or -1 keeps all (extension)."
    )
    min_p: float = Field(
        default=0.0, ge=0, le=1, description="Least share of the likeliest's probability."
    )
    typical_p: float = Field(
        default=1.0, gt=0, le=1, description="Share of typical tokens to keep."
    )
    repetition_penalty: float = Field(
        default=1.0, ge=0.01, le=10, description="Divides the scores of tokens that occurred."
    )
    presence_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="Taken off the score of each token that occurred."
    )
    frequency_penalty: float = Field(
        default=0.0, ge=-2, le=2, description="The same, as often as it occurred."
    )
    logit_bias: LogitBias = Field(
        default={}, description="Added to scores, by token id; -100 to 100, up to 300 ids."
    )
    allowed_token_ids: NamedIds = Field(default=[], description="The only tokens that may come.")
    bad_words: BadWords = Field(default=[], description="Texts that may not come (extension).")
    stop: Stop = Field(default=[], description="Texts that end the answer; not part of it.")
    stop_token_ids: NamedIds = Field(default=[], description="Tokens that end the answer.")
    include_stop_str_in_output: bool = Field(
        default=False, description="Keep the stop text that ended the answer (extension)."
    )
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT32, description="Before it, no end mark.")
    ignore_eos: bool = Field(default=False, description="Go on to max_tokens, past end marks.")
    n: int = Field(default=1, ge=1, le=MAX_INT32, description="Choices for each prompt.")
    best_of: int | None = Field(
        default=None,
        ge=1,
        le=MAX_INT32,
        description="Samples of each prompt, of which the n likeliest (per token) are told.",
    )
    seed: int | None = Field(
        default=None,
        ge=-MAX_INT64 - 1,
        le=MAX_INT64,
        description="Makes sampling repeatable; sample i of a prompt uses seed + i.",
    )
    use_beam_search: bool = Field(
        default=False, description="Search for the likeliest answers; n of them, best first."
    )
    num_beams: int | None = Field(default=None, ge=1, le=MAX_BEAMS, description="4, or n if more.")
    length_penalty: float = Field(
        default=1.0, ge=-10, le=10, description="Of beam search; above 0 favours long answers."
    )
    early_stopping: bool = Field(
        default=False, description="End the search at num_beams complete answers."
    )
    response_format: ResponseFormat | None = Field(
        default=None, description="text, json_object or json_schema."
    )
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="One of json, regex, choice, grammar, json_object (extension)."
    )
    stream: bool = Field(default=False, description="Send server-sent events.")
    stream_options: StreamOptions | None = None
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=1, le=MAX_INT32, description="Keep so many tokens of a longer prompt."
    )
    truncation_side: Literal["left", "right"] = Field(
        default="left", description="Where truncate_prompt_tokens takes tokens away."
    )
    add_special_tokens: bool = Field(
        default=True, description="Close what the encoder reads with the model's end mark."
    )
    skip_special_tokens: bool = Field(
        default=True, description="Only true works: marks are never part of a text."
    )
    return_token_ids: bool = Field(default=False, description="Tell ids of prompts and answers.")
    return_tokens_as_token_ids: bool = Field(
        default=False, description="Name tokens 'token_id:7' in log-probabilities (extension)."
    )
    request_id: SafeName | None = Field(
        default=None, description="Becomes part of the id of the reply (extension)."
    )
    receipt: bool = Field(default=False, description="Tell all that makes the answer repeatable.")

    @property
    def has_token_rules(self) -> bool:
        """Whether it takes a look at the whole vocabulary to tell if any token may come first."""
        return bool(self.allowed_token_ids or self.bad_words or self.stop_token_ids)

    @property
    def num_samples(self) -> int:
        """Requests to the engine for each prompt."""
        return 1 if self.use_beam_search else (self.best_of or self.n)

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with a chunk of accounts."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_continuous_usage(self) -> bool:
        """Whether each chunk of a stream tells the usage so far."""
        return self.stream_options is not None and self.stream_options.continuous_usage_stats

    def beams(self) -> BeamParams | None:
        """How to search, if it is to be by beams."""
        if not self.use_beam_search:
            return None
        return BeamParams(
            num_beams=self.num_beams or max(self.n, DEFAULT_BEAMS),
            length_penalty=self.length_penalty,
            stops_early=self.early_stopping,
        )

    def sampling(
        self, max_tokens: int, logprobs: int | None, prompt_logprobs: int | None = None
    ) -> SamplingParams:
        """Parameters of the first sample. Raises RequestError if they are out of bounds.

        `max_tokens` 0 becomes 1: the engine always makes a token, which is then not told.
        """
        if self.best_of and self.best_of > self.n:
            logprobs = logprobs or 0  # to rank them by
        return SamplingParams(
            max_tokens=max(max_tokens, 1),
            temperature=self.temperature,
            top_k=max(self.top_k, 0),
            top_p=self.top_p,
            min_p=self.min_p,
            typical_p=self.typical_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple((int(token_id), bias) for token_id, bias in self.logit_bias.items()),
            seed=self.seed,
            allowed_token_ids=tuple(dict.fromkeys(self.allowed_token_ids)),
            stop_token_ids=tuple(dict.fromkeys(self.stop_token_ids)),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
            include_stop=self.include_stop_str_in_output,
        )

    def samples(self, first: SamplingParams) -> list[SamplingParams]:
        """Parameters of each sample of a prompt; lists, which may be long, are shared."""
        if self.seed is None:
            return [first] * self.num_samples
        return [replace(first, seed=self.seed + sample) for sample in range(self.num_samples)]

    def check_common(self) -> None:
        """Raise ApiError (400) for what is well formed but cannot be done."""
        if not self.skip_special_tokens:
            text = "skip_special_tokens false is not supported: marks are never part of a text"
            raise bad_field(text, "skip_special_tokens", "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise bad_field("stream_options is for stream: true only", "stream_options")
        if self.best_of is not None and self.best_of < self.n:
            raise bad_field(f"best_of {self.best_of} is less than n {self.n}", "best_of")
        if self.best_of is not None and self.best_of > self.n and self.stream:
            text = "best_of above n cannot be streamed: the best is known at the end only"
            raise bad_field(text, "best_of")
        if self.use_beam_search:
            self._check_beams()
        else:
            self._refuse_others(ONLY_WITH_BEAMS, "is for use_beam_search: true only")

    def _check_beams(self) -> None:
        for name, neutral in NOT_WITH_BEAMS.items():
            if name in self.model_fields_set and getattr(self, name) not in neutral:
                raise bad_field(f"{name} does not go with use_beam_search; leave it out", name)
        if self.num_beams is not None and self.num_beams < self.n:
            raise bad_field(f"n {self.n} is more than the {self.num_beams} beams", "n")
        if self.n > MAX_BEAMS:
            raise bad_field(f"n {self.n} is more than the most beams, {MAX_BEAMS}", "n")

    def _refuse_others(self, fields: dict[str, object], why: str) -> None:
        for name, neutral in fields.items():
            if name in self.model_fields_set and getattr(self, name) != neutral:
                raise bad_field(f"{name} {why}", name)

    def check_choices(self, num_prompts: int, max_choices: int, param: str = "prompt") -> None:
        """Raise ApiError (400) if there is no prompt, or too many choices in all."""
        if not num_prompts:
            raise bad_field(f"{param} is an empty list", param)
        beams = self.beams()
        each = beams.num_beams if beams else self.num_samples  # a beam takes as much as a sample
        if num_prompts * each > max_choices:
            factor = "num_beams" if beams else "best_of" if self.best_of else "n"
            text = f"{num_prompts} prompts x {factor} {each} exceed {max_choices} choices"
            raise bad_field(
                f"{text} in one request", param if num_prompts > max_choices else factor
            )

    def ignored_fields(self) -> list[str]:
        """Names of fields that have no meaning here, those of nested objects with their path."""
        names = list(self.extras())
        for outer in ("stream_options", "response_format", "structured_outputs"):
            inner = getattr(self, outer)
            if inner is not None:
                names += [f"{outer}.{name}" for name in inner.extras()]
        return names[:MAX_NAMED_FIELDS]
