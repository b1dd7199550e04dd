"""Bodies of POST /v1/chat/completions."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field, JsonValue, model_serializer, model_validator

from engine.request import MAX_LOGPROBS
from server.schemas import (
    MAX_INT32,
    MAX_NAMED_FIELDS,
    Body,
    Receipt,
    Text,
    Timings,
    Usage,
    one_finding,
)
from server.schemas_generation import GenerationBody, bad_field

MAX_TURNS = 1000
MAX_PARTS = 1000
DEFAULT_MAX_TOKENS = 256


class TextPart(Body):
    """A part of a message; only text is understood."""

    type: Literal["text"]
    text: Text


Parts = Annotated[list[TextPart], Field(max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[
    Text | Parts, one_finding(f"takes a string or up to {MAX_PARTS} parts of type text")
]


class Message(Body):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = ""
    name: Text | None = None
    tool_calls: list[JsonValue] = []

    def text(self) -> str:
        """All of its text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatRequest(GenerationBody):
    """Body of POST /v1/chat/completions. Null means absent for every field."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_TURNS, fail_fast=True)]
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_INT32, description="Older name.")
    max_completion_tokens: int | None = Field(
        default=None, ge=1, le=MAX_INT32, description=f"Most tokens; {DEFAULT_MAX_TOKENS}."
    )
    logprobs: bool = Field(default=False, description="Tell log-probabilities of the tokens.")
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[JsonValue] = Field(default=[], description="Only an empty list works.")
    tool_choice: JsonValue = Field(default="none", description="Only none or auto work.")
    functions: list[JsonValue] = Field(default=[], description="Only an empty list works.")
    parallel_tool_calls: bool = True
    continue_final_message: bool = Field(
        default=False,
        description="The last message, an assistant's, is what the answer begins with.",
    )
    add_generation_prompt: bool | None = Field(
        default=None, description="Let the template open the answer; true unless continuing."
    )
    chat_template_kwargs: dict[str, JsonValue] = Field(
        default={}, description="Plain values for names that the model's own template uses."
    )
    chat_template: JsonValue = Field(default=None, description="Refused: templates are code.")
    metadata: JsonValue = Field(default=None, description="Not kept.")
    store: bool = Field(default=False, description="Nothing is ever stored.")

    @model_validator(mode="before")
    @classmethod
    def _count_parts(cls, body: object) -> object:
        messages = body.get("messages") if isinstance(body, dict) else None
        listed = messages if isinstance(messages, list) else []
        contents = [m.get("content") for m in listed if isinstance(m, dict)]
        if sum(len(parts) for parts in contents if isinstance(parts, list)) > MAX_PARTS:
            raise ValueError(f"messages have more than {MAX_PARTS} parts in all")
        return body

    @property
    def limit(self) -> int | None:
        """Most tokens to generate, if the request says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_logprobs(self) -> int | None:
        """Likeliest tokens to tell at each place; None without log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def check(self) -> None:
        """Raise ApiError (400) for what is well formed but cannot be done."""
        self.check_common()
        self._check_tools()
        if self.chat_template is not None:
            text = "chat_template is not taken from requests; it is the model's own"
            raise bad_field(text, "chat_template", "unsupported_parameter")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_field("top_logprobs needs logprobs: true", "top_logprobs")
        given = self.max_tokens, self.max_completion_tokens
        if None not in given and given[0] != given[1]:
            text = "max_tokens and max_completion_tokens differ; give one"
            raise bad_field(text, "max_completion_tokens")
        if self.continue_final_message:
            if self.add_generation_prompt:
                text = "add_generation_prompt does not go with continue_final_message"
                raise bad_field(text, "add_generation_prompt")
            if self.messages[-1].role != "assistant" or len(self.messages) < 2:
                text = "continue_final_message needs a last message of the assistant, after others"
                raise bad_field(text, "messages")

    def _check_tools(self) -> None:
        has_calls = any(message.tool_calls for message in self.messages)
        fields = {"tools": self.tools, "functions": self.functions, "messages": has_calls}
        for name, given in fields.items():
            if given:
                text = f"{name}: this model calls no tools; leave them out"
                raise bad_field(text, name, "unsupported_parameter")
        if self.tool_choice not in ("none", "auto"):
            text = "tool_choice: this model calls no tools; allowed: none, auto"
            raise bad_field(text, "tool_choice", "unsupported_parameter")

    def ignored_fields(self) -> list[str]:
        """Names of fields that have no meaning here."""
        return [*super().ignored_fields(), *self.idle_fields()][:MAX_NAMED_FIELDS]

    def idle_fields(self) -> list[str]:
        """Known fields that were given and change nothing."""
        return [name for name in ("metadata", "store") if getattr(self, name)]


class ChatTop(BaseModel):
    """One of the likeliest tokens; `bytes` rebuild characters that tokens share."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatToken(ChatTop):
    """A token of an answer, and the likeliest ones in its place."""

    top_logprobs: list[ChatTop]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer, by token."""

    content: list[ChatToken]
    refusal: None = None


class ChatMessage(BaseModel):
    """An answer; its content is never null."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatDelta(BaseModel):
    """What a chunk adds to an answer; only what is set is sent."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _leave_out_nulls(self) -> dict[str, str]:
        return {name: value for name, value in self if value is not None}


class ChatChoice(BaseModel):
    """One answer; what OpenAI's has not is an extension."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None = None
    seed: int | None = None
    score: float | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one answer."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    seed: int | None = None
    token_ids: list[int] | None = None
    prompt_token_ids: list[int] | None = None


class ChatCompletion(BaseModel):
    """Reply of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    timings: Timings | None = None
    adapter: str | None = None
    receipt: Receipt | None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    timings: Timings | None = None
    adapter: str | None = None
    receipt: Receipt | None = None
