"""Bodies of the routes that make no text: embeddings, scores, tokens."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from engine.request import MAX_LOGPROBS
from server.schemas import (
    MAX_INT32,
    Body,
    OnePrompt,
    Prompt,
    RoutedBody,
    Text,
    Timings,
    TokenIds,
    Usage,
    list_prompts,
    one_finding,
)
from server.schemas_generation import bad_field

MAX_CONTINUATIONS = 256


class EmbeddingRequest(RoutedBody):
    """Body of POST /v1/embeddings."""

    input: Prompt = Field(description="Texts, or token ids of this model's own vocabulary.")
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(
        default=None, ge=1, le=MAX_INT32, description="Only the model's own width works."
    )

    def prompts(self) -> list[str | list[int]]:
        """The inputs one by one."""
        return list_prompts(self.input)


class Embedding(BaseModel):
    """One vector: numbers, or base64 of them as little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    """Tokens that were read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Reply of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage
    adapter: str | None = None


Continuations = Annotated[
    list[OnePrompt],
    Field(min_length=1, max_length=MAX_CONTINUATIONS, fail_fast=True),
    one_finding(f"takes 1 to {MAX_CONTINUATIONS} strings or lists of token ids"),
]


class ScoreRequest(RoutedBody):
    """Body of POST /v1/score: every continuation is scored after every context."""

    context: OnePrompt | None = Field(default=None, description="What the encoder reads.")
    contexts: Prompt | None = Field(default=None, description="Several of them.")
    continuations: Continuations = Field(description="What the decoder might say, text or ids.")
    decoder_prompt: OnePrompt = Field(
        default="", description="What the decoder has said before, text or ids."
    )
    logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="Tell so many of the likeliest tokens."
    )
    fill: bool = Field(default=False, description="Continuations fill the one <span> of a context.")
    add_special_tokens: bool = Field(
        default=True, description="Close what the encoder reads with the model's end mark."
    )

    def prompts(self) -> list[str | list[int]]:
        """The contexts one by one. Raises ApiError (400) if none or both fields are given."""
        if (self.context is None) == (self.contexts is None):
            raise bad_field("give either context or contexts", "context")
        if self.contexts is not None:
            return list_prompts(self.contexts)
        return [self.context] if self.context is not None else []


class TokenScore(BaseModel):
    """The likeliest tokens at one place, by id, with natural logarithms."""

    top: list[tuple[int, float]]


class ContinuationScore(BaseModel):
    """How likely the model finds one continuation after one context; natural logarithms."""

    index: int
    logprob: float = Field(description="Of the whole continuation.")
    is_greedy: bool = Field(description="Whether each token was the likeliest.")
    token_ids: list[int]
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]] | None = Field(
        default=None, description="Ids and log-probabilities, with logprobs."
    )


class ContextScores(BaseModel):
    """The scores after one context, in the order of the continuations."""

    index: int
    scores: list[ContinuationScore]


class Scores(BaseModel):
    """Reply of POST /v1/score."""

    id: str
    object: Literal["score"] = "score"
    created: int
    model: str
    system_fingerprint: str
    data: list[ContextScores]
    usage: Usage
    timings: Timings
    adapter: str | None = None


class TokenizeRequest(Body):
    """Body of POST /tokenize."""

    model: str | None = None
    prompt: Text = Field(description="Text to tokenize.")
    add_special_tokens: bool = Field(
        default=True,
        description="Add the end mark of the encoder; what a decoder-only model reads first.",
    )
    return_token_strs: bool = False


class Tokens(BaseModel):
    """Reply of POST /tokenize."""

    tokens: list[int]
    count: int
    max_model_len: int
    token_strs: list[str] | None = None


class DetokenizeRequest(Body):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: Annotated[TokenIds, one_finding("takes a list of token ids")]


class Detokenized(BaseModel):
    """Reply of POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """Reply of GET /tokenizer_info; names of marks that have no text are those of their kind."""

    tokenizer_class: str
    vocab_size: int
    num_sentinels: int
    model_max_length: int
    eos_token: str
    eos_token_id: int
    bos_token: str | None
    pad_token: str
    pad_token_id: int
    chat_template: str | None
