"""Bodies of requests and replies as OpenAI clients send and read them, with our extensions."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from engine.request import MAX_LOGPROBS, MAX_STOP_STRINGS, SamplingParams
from server.errors import ApiError

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
OPENAI_MAX_TOKENS = 16
MAX_NAMED_FIELDS = 20
MAX_BIASES = 300
MAX_PROMPTS = 2048  # more are not even counted: of a million that takes seconds of the event loop

# Known fields that do not work yet, each with the values that ask for nothing. Null is always one.
UNSUPPORTED: dict[str, tuple[object, ...]] = {
    "bad_words": ([],),
    "best_of": (1,),
    "echo": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "prompt_logprobs": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "suffix": ("",),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
}


def one_finding(text: str) -> WrapValidator:
    """Say what a field with several forms takes, instead of why each form does not fit."""

    def check(value: object, handler: ValidatorFunctionWrapHandler) -> object:
        try:
            return handler(value)
        except ValidationError as error:
            raise ValueError(text) from error

    return WrapValidator(check)


def require_unicode(text: str) -> str:
    """Refuse half characters, which JSON can spell but no tokenizer can read."""
    text.encode()
    return text


Text = Annotated[str, AfterValidator(require_unicode)]
Texts = Annotated[list[Text], Field(fail_fast=True, max_length=MAX_PROMPTS)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)]
NamedIds = Annotated[TokenIds, one_finding("takes a list of token ids")]
Prompt = Annotated[
    Text | Texts | TokenIds | ManyTokenIds,
    one_finding(
        "takes a string, a list of strings, a list of token ids or a list of such lists; "
        f"of prompts up to {MAX_PROMPTS}"
    ),
]
StopText = Annotated[Text, Field(min_length=1, max_length=1000)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOP_STRINGS)]
Stop = Annotated[
    StopText | StopTexts,
    one_finding(f"takes a string or up to {MAX_STOP_STRINGS} strings of 1 to 1000 characters"),
]


Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
LogitBias = Annotated[
    dict[TokenName, Bias],
    Field(max_length=MAX_BIASES),
    one_finding(f"takes up to {MAX_BIASES} token ids, each with a number of -100 to 100"),
]


class Body(BaseModel):
    """Base of request bodies: null means absent, unknown fields are kept, types are exact."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        return {name: value for name, value in body.items() if value is not None}

    def extras(self) -> dict[str, object]:
        """Fields that this class does not define."""
        return self.model_extra or {}


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = Field(default=False, description="Send a last chunk with the usage.")


class CompletionRequest(Body):
    """Body of POST /v1/completions. Null means absent for every field."""

    model: str | None = Field(default=None, description="Id of the served model.")
    prompt: Prompt = Field(
        description="Text or token ids to continue, or a list of either: one choice for each."
    )
    max_tokens: int = Field(
        default=OPENAI_MAX_TOKENS, ge=1, le=MAX_INT32, description="Most tokens to generate."
    )
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
    stop_token_ids: NamedIds = Field(default=[], description="Tokens that end the answer.")
    min_tokens: int = Field(default=0, ge=0, le=MAX_INT32, description="Before it, no end mark.")
    ignore_eos: bool = Field(default=False, description="Go on to max_tokens, past end marks.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Tell the log-probability of each token, and of so many of the likeliest.",
    )
    return_tokens_as_token_ids: bool = Field(
        default=False, description="Name tokens 'token_id:7' in log-probabilities (extension)."
    )
    n: int = Field(default=1, ge=1, le=MAX_INT32, description="Choices for each prompt.")
    seed: int | None = Field(
        default=None,
        ge=-MAX_INT64 - 1,
        le=MAX_INT64,
        description="Makes sampling repeatable; sample i of a prompt uses seed + i.",
    )
    stop: Stop = Field(default=[], description="Texts that end the answer; not part of it.")
    stream: bool = Field(default=False, description="Send server-sent events.")
    stream_options: StreamOptions | None = None
    fill: bool = Field(
        default=False,
        description="Fill blanks, marked <span> in the prompt, instead of going on (extension).",
    )

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if any(isinstance(item, int) for item in self.prompt):
            return [[item for item in self.prompt if isinstance(item, int)]]
        return [item for item in self.prompt if not isinstance(item, int)]

    def samples(self) -> list[SamplingParams]:
        """Parameters of each sample of a prompt. Raises RequestError if they are out of bounds."""
        first = self._sampling()  # whose lists, which may be long, all samples share
        if self.seed is None:
            return [first] * self.n
        return [replace(first, seed=self.seed + sample) for sample in range(self.n)]

    def _sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens,
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
            logprobs=self.logprobs,
            stop=(self.stop,) if isinstance(self.stop, str) else tuple(self.stop),
        )

    def check(self, max_choices: int) -> None:
        """Raise ApiError (400) for what is well formed but cannot be done."""
        for name in sorted(self.extras().keys() & UNSUPPORTED.keys()):
            if self.extras()[name] not in (*UNSUPPORTED[name], *self._also_neutral(name)):
                text = f"{name} is not supported; leave it out"
                raise ApiError(400, text, code="unsupported_parameter", param=name)
        if self.stream_options is not None and not self.stream:
            text = "stream_options is for stream: true only"
            raise ApiError(400, text, code="invalid_value", param="stream_options")
        num_prompts = len(self.prompts())
        if not num_prompts:
            raise ApiError(400, "prompt is an empty list", code="invalid_value", param="prompt")
        if num_prompts * self.n > max_choices:
            text = f"{num_prompts} prompts x n {self.n} exceed {max_choices} choices in one request"
            param = "prompt" if num_prompts > max_choices else "n"
            raise ApiError(400, text, code="invalid_value", param=param)

    def _also_neutral(self, name: str) -> tuple[object, ...]:
        return (self.n,) if name == "best_of" else ()

    def ignored_fields(self) -> list[str]:
        """Names of fields that have no meaning here."""
        names = [name for name in self.extras() if name not in UNSUPPORTED]
        if self.stream_options is not None:
            names += [f"stream_options.{name}" for name in self.stream_options.extras()]
        return names[:MAX_NAMED_FIELDS]


class Logprobs(BaseModel):
    """Log-probabilities of a text, by token; the map holds the likeliest and the chosen one.

    `text_offset` is the character of the answer from which on the text of a token is found.
    """

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Choice(BaseModel):
    """One answer, or a piece of one; `spans`, `stop_reason` and `seed` are extensions."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    seed: int | None = None
    spans: list[str] | None = Field(default=None, description="Answers of the blanks, with fill.")


class Usage(BaseModel):
    """Tokens of a request: prompts once each, answers of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Timings(BaseModel):
    """An extension: where the time of a request went, in milliseconds over all choices.

    The counts of experts are there where experts are offloaded.
    """

    queued_ms: float
    encode_ms: float
    decode_ms: float
    expert_hits: int | None = None
    expert_misses: int | None = None
    expert_bytes: int | None = Field(default=None, description="Read from disk or host memory.")
    expert_stall_ms: float | None = None


class Completion(BaseModel):
    """Reply of POST /v1/completions, or one chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str | None = None
    choices: list[Choice]
    usage: Usage | None = None
    timings: Timings | None = None


class ErrorDetail(BaseModel):
    """What went wrong; `param` names the field, `code` is for programs."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """Body of every failure."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "infmoe"
    kind: Literal["base"] = "base"
    architecture: Literal["encoder_decoder"] = "encoder_decoder"


class ModelList(BaseModel):
    """Reply of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
