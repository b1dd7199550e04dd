"""What bodies of requests and replies have in common: types of fields, accounts, failures."""

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

from engine.request import MAX_STOP_STRINGS
from server.schemas_adapters import AdapterCard

MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1
MAX_NAMED_FIELDS = 20
MAX_FIELDS = 200  # of an object; of 100,000 unknown ones each costs time to keep
MAX_BIASES = 300
MAX_BAD_WORDS = 100
MAX_PROMPTS = 2048  # more are not even counted: of a million that takes seconds of the event loop
MAX_NAME_CHARS = 256


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
Name = Annotated[Text, Field(max_length=MAX_NAME_CHARS)]
SafeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
ManyTokenIds = Annotated[list[TokenIds], Field(fail_fast=True, max_length=MAX_PROMPTS)]
NamedIds = Annotated[TokenIds, one_finding("takes a list of token ids")]
OnePrompt = Annotated[Text | TokenIds, one_finding("takes a string or a list of token ids")]
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
BadWords = Annotated[
    list[StopText],
    Field(max_length=MAX_BAD_WORDS),
    one_finding(f"takes up to {MAX_BAD_WORDS} strings of 1 to 1000 characters"),
]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenName = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
LogitBias = Annotated[
    dict[TokenName, Bias],
    Field(max_length=MAX_BIASES),
    one_finding(f"takes up to {MAX_BIASES} token ids, each with a number of -100 to 100"),
]


def list_prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a field that takes one or many, one by one."""
    if isinstance(prompt, str):
        return [prompt]
    if any(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    return [item for item in prompt if not isinstance(item, int)]


class Body(BaseModel):
    """Base of request bodies: null means absent, unknown fields are kept, types are exact."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, body: object) -> object:
        if not isinstance(body, dict):
            return body
        if len(body) > MAX_FIELDS:
            raise ValueError(
                f"an object has {len(body)} fields; no more than {MAX_FIELDS} are read"
            )
        return {name: value for name, value in body.items() if value is not None}

    def extras(self) -> dict[str, object]:
        """Fields that this class does not define."""
        return self.model_extra or {}

    def ignored_fields(self) -> list[str]:
        """Names of fields that have no meaning here."""
        return list(self.extras())[:MAX_NAMED_FIELDS]


class RoutedBody(Body):
    """A body that names what is to answer, and how strictly it is to be read."""

    model: Name | None = Field(
        default=None, description="Id of a served model or adapter; name@version pins a version."
    )
    adapter: Name | None = Field(
        default=None, description="Soft prompt to use, name or name@version; '' for none."
    )
    adapter_id: Name | None = Field(default=None, description="The same as adapter.")
    priority: int | None = Field(
        default=None,
        ge=-MAX_INT32 - 1,
        le=MAX_INT32,
        description="Higher goes first; never above that of the key, which is the default.",
    )
    timeout: float | None = Field(
        default=None, gt=0, le=86_400, description="Seconds until the request ends as it is."
    )
    cache_salt: Name | None = Field(
        default=None, description="What the encoder made is reused under the same salt only."
    )
    user: Text | None = Field(
        default=None, max_length=10_000, description="Told to the log as a hash only."
    )
    strict: bool = Field(default=False, description="Refuse unknown fields instead of naming them.")


class PromptTokensDetails(BaseModel):
    """Where the tokens of a prompt went; those of a soft prompt count as the encoder's."""

    encoder_tokens: int
    decoder_prompt_tokens: int
    cached_tokens: int = 0


class Usage(BaseModel):
    """Tokens of a request: prompts once each, answers of all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


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


class Receipt(BaseModel):
    """An extension: all that is needed to get the same answer again."""

    model: str
    adapter: str | None = Field(description="The resolved name@version of the soft prompt.")
    fingerprint: str
    seeds: list[int] = Field(description="Of each request to the engine, in order.")
    parameters: dict[str, object] = Field(description="Those that changed anything.")
    num_blanks: int
    task: dict[str, object] | None = Field(description="Beam search with its parameters, if any.")
    adapter_checksum: str | None = Field(description="SHA-256 of the vectors that were used.")
    adapter_base_fingerprint: str | None
    model_fingerprint: str = Field(description="Of the weights; `fingerprint`: and our version.")
    is_batch_invariant: bool
    ignored_fields: list[str]


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
    """The base model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["infmoe"] = "infmoe"
    root: str
    parent: None = None
    kind: Literal["base"] = "base"
    architecture: Literal["encoder_decoder", "decoder_only"]
    state: str
    max_model_len: int = Field(description="As max_input_tokens, under the name of vLLM.")
    max_input_tokens: int
    max_decoder_tokens: int


class ModelList(BaseModel):
    """Reply of GET /v1/models: the base model, then adapters."""

    object: Literal["list"] = "list"
    data: list[ModelCard | AdapterCard]
