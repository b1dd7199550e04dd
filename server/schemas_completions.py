"""Bodies of POST /v1/completions and POST /v1/generate, which have most in common."""

from typing import Literal

from pydantic import BaseModel, Field

from engine.request import MAX_LOGPROBS
from server.schemas import (
    MAX_INT32,
    OnePrompt,
    Prompt,
    Receipt,
    Text,
    Timings,
    Usage,
    list_prompts,
)
from server.schemas_generation import GenerationBody, bad_field

OPENAI_MAX_TOKENS = 16
NATIVE_MAX_TOKENS = 64


class PromptedBody(GenerationBody):
    """A body that gives the encoder's texts as they are, and what the answers begin with."""

    decoder_prompt: OnePrompt = Field(
        default="",
        description="What every answer begins with, text or token ids; given, not generated.",
    )
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="Tell the log-probability of each token, and of so many of the likeliest.",
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="The same for the tokens of the decoder prompt (extension).",
    )
    fill: bool = Field(
        default=False,
        description="Fill blanks, marked <span> in the prompt, instead of going on (extension).",
    )
    echo: bool = Field(
        default=False,
        description="Begin the text with the decoder prompt; of a decoder-only model with the "
        "prompt itself, then that. With logprobs and without a decoder prompt, the prompt itself "
        "is given to the decoder, and nothing to the encoder, so that each of its tokens has a "
        "log-probability.",
    )

    def check_prompted(self, max_tokens: int) -> None:
        """Raise ApiError (400) for what is well formed but cannot be done."""
        self.check_common()
        if max_tokens == 0 and not self.echo and self.prompt_logprobs is None:
            raise bad_field("max_tokens 0 is for echo or prompt_logprobs only", "max_tokens")
        if max_tokens == 0 and self.use_beam_search:
            raise bad_field("max_tokens 0 does not go with use_beam_search", "max_tokens")
        for name in ("decoder_prompt", "response_format", "structured_outputs"):
            if self.fill and getattr(self, name):
                raise bad_field(f"{name} does not go with fill", name)
        if self.fill and self.truncate_prompt_tokens is not None:
            text = "truncate_prompt_tokens does not go with fill: blanks might be lost"
            raise bad_field(text, "truncate_prompt_tokens")

    @property
    def is_scoring_prompts(self) -> bool:
        """Whether the prompt is to be read by the decoder, so that its tokens can be scored."""
        return self.echo and self.logprobs is not None and not self.decoder_prompt


class CompletionRequest(PromptedBody):
    """Body of POST /v1/completions. Null means absent for every field."""

    prompt: Prompt = Field(
        description="Text or token ids to continue, or a list of either: one choice for each."
    )
    max_tokens: int = Field(
        default=OPENAI_MAX_TOKENS, ge=0, le=MAX_INT32, description="Most tokens to generate."
    )
    suffix: Text = Field(default="", description="Only an empty one works; see fill.")

    def prompts(self) -> list[str | list[int]]:
        """The prompts one by one."""
        return list_prompts(self.prompt)

    def check(self) -> None:
        """Raise ApiError (400) for what is well formed but cannot be done."""
        if self.suffix:
            text = "suffix is not supported; mark the gap with <span> and set fill"
            raise bad_field(text, "suffix", "unsupported_parameter")
        self.check_prompted(self.max_tokens)


class GenerateRequest(PromptedBody):
    """Body of POST /v1/generate: what the encoder reads and what the decoder begins with."""

    text: Prompt = Field(description="What the encoder reads, text or token ids, one or many.")
    max_tokens: int = Field(
        default=NATIVE_MAX_TOKENS, ge=0, le=MAX_INT32, description="Most tokens to generate."
    )

    def prompts(self) -> list[str | list[int]]:
        """The texts one by one."""
        return list_prompts(self.text)

    def check(self) -> None:
        """Raise ApiError (400) for what is well formed but cannot be done."""
        self.check_prompted(self.max_tokens)


class Logprobs(BaseModel):
    """Log-probabilities of a text, by token; the map holds the likeliest and the chosen one.

    `text_offset` is the character of the answer from which on the text of a token is found.
    """

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """How likely a token of the decoder prompt was, or another one in its place."""

    logprob: float
    decoded_token: str


class Choice(BaseModel):
    """One answer, or a piece of one; what OpenAI's has not is an extension."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    seed: int | None = None
    score: float | None = Field(default=None, description="Of a hypothesis of beam search.")
    spans: list[str] | None = Field(default=None, description="Answers of the blanks, with fill.")
    token_ids: list[int] | None = Field(default=None, description="With return_token_ids.")
    prompt_token_ids: list[int] | None = Field(default=None, description="What the encoder read.")
    decoder_prompt_token_ids: list[int] | None = None
    prompt_logprobs: list[dict[str, PromptLogprob] | None] | None = Field(
        default=None, description="Of the decoder prompt, by token id."
    )


class Completion(BaseModel):
    """Reply of POST /v1/completions, or one chunk of it."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage | None = None
    timings: Timings | None = None
    adapter: str | None = Field(default=None, description="The resolved name@version.")
    receipt: Receipt | None = None


class TokenInfo(BaseModel):
    """A token with its log-probability and the likeliest ones in its place."""

    id: int
    token: str
    logprob: float | None
    top: list[tuple[int, float]]


class Generated(BaseModel):
    """One answer of POST /v1/generate, or a piece of one."""

    index: int
    text: str
    token_ids: list[int]
    spans: list[str] | None = None
    tokens: list[TokenInfo] | None = Field(default=None, description="With logprobs.")
    decoder_tokens: list[TokenInfo] | None = Field(default=None, description="prompt_logprobs.")
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    seed: int | None = None
    score: float | None = None
    encoder_token_ids: list[int] | None = Field(default=None, description="return_token_ids.")
    decoder_prompt_token_ids: list[int] | None = None


class Generation(BaseModel):
    """Reply of POST /v1/generate, or one chunk of it."""

    id: str
    object: Literal["generation"] = "generation"
    created: int
    model: str
    system_fingerprint: str
    answers: list[Generated]
    usage: Usage | None = None
    timings: Timings | None = None
    adapter: str | None = None
    receipt: Receipt | None = None
