"""POST /v1/chat/completions: turns go to the encoder, or to a decoder-only model as its prompt."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import BaseModel

from engine.errors import RequestError
from engine.prompt import MAX_TOKEN_CHARS
from server.body_route import post
from server.chat_marks import Cover, Shield, make_shield
from server.gateway import Gateway
from server.logprobs import tell_chat_logprobs
from server.orders import Prompt
from server.parts import Ending, Part
from server.protocol import Engine
from server.responses import streamed
from server.schemas import Usage
from server.schemas_chat import (
    DEFAULT_MAX_TOKENS,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    ChatRequest,
    Message,
)
from server.templates import ChatTemplate
from server.writing import Draft, Route, Style, write

NO_TEMPLATE = (
    "this model brings no chat template (chat_template.jinja, or chat_template in "
    "tokenizer_config.json); send its text to /v1/completions"
)


def join_turns(messages: Sequence[Message]) -> str:
    """What the encoder reads where the model brings no template: the texts, one on each line.

    Models of this kind were not trained on roles, which are therefore not told.
    """
    return "\n".join(message.text() for message in messages)


def make_chat_shield(body: ChatRequest, engine: Engine) -> Shield | None:
    """What keeps marks that somebody typed from being marks; None if there are none."""
    settings = (value for value in body.chat_template_kwargs.values() if isinstance(value, str))
    texts = [*(message.text() for message in body.messages), *settings]
    return make_shield(texts, getattr(engine.tokenizer, "mark_texts", ()))


def encode_rendered(text: str, engine: Engine, shield: Shield | None) -> Prompt:
    """Ids of what a template wrote, which has all marks already, also that of the beginning.

    A text that cannot fit is returned as it is, and refused later.
    """
    if len(text) > engine.config.max_prompt_tokens * MAX_TOKEN_CHARS:
        return text if shield is None else shield.uncover(text)
    encode = engine.tokenizer.encode
    return encode(text) if shield is None else shield.encode(text, encode)


def default_limit(engine: Engine, prompt: Prompt, decoder_prompt: Prompt) -> int:
    """Most tokens of an answer that names no limit: what OpenAI's is would block all caches.

    Of a decoder-only model the prompt takes its share of the room.
    """
    room = engine.config.max_prompt_tokens
    if isinstance(decoder_prompt, str):
        decoder_prompt = engine.tokenizer.encode(decoder_prompt)
    room -= len(decoder_prompt or engine.config.answer_begin_ids)
    room -= 0 if isinstance(prompt, str) else len(prompt)
    return max(1, min(DEFAULT_MAX_TOKENS, room))


def read_chat(body: ChatRequest, template: ChatTemplate | None, engine: Engine) -> Draft:
    """What a conversation comes to. Raises RequestError if the template refuses it."""
    messages = body.messages
    is_decoder_only = engine.config.is_decoder_only
    shield = make_chat_shield(body, engine) if is_decoder_only else None
    decoder_prompt: Prompt = ""
    if body.continue_final_message:
        *messages, last = messages
        decoder_prompt = last.text()
        if shield is not None:
            decoder_prompt = encode_rendered(shield.cover(decoder_prompt), engine, shield)
    if template is None:
        if is_decoder_only:
            raise RequestError(NO_TEMPLATE, "messages")
        text = join_turns(messages)
    else:
        is_opening = (
            not body.continue_final_message
            if body.add_generation_prompt is None
            else (body.add_generation_prompt)
        )
        # what is to be continued follows the mark of the assistant's turn
        is_opening |= is_decoder_only and body.continue_final_message

        def render(cover: Cover) -> str:
            turns = [{"role": turn.role, "content": cover(turn.text())} for turn in messages]
            settings = body.chat_template_kwargs.items()
            told = {name: cover(v) if isinstance(v, str) else v for name, v in settings}
            return template.render(turns, told, is_opening=is_opening)

        text = render(str) if shield is None else shield.render(render)
    prompt = encode_rendered(text, engine, shield) if is_decoder_only else text
    return Draft(
        prompts=[prompt],
        decoder_prompt=decoder_prompt,
        max_tokens=body.limit or default_limit(engine, prompt, decoder_prompt),
        logprobs=body.num_logprobs,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatStyle(Style):
    """Chat completions as OpenAI tells them."""

    def chunks(self, part: Part, usage: Usage | None) -> Sequence[ChatChunk]:
        """The role before the first text, then text, then the reason of the end without text."""
        told: list[ChatChunkChoice] = []
        if part.request is not None:
            prompt_ids = list(part.request.encoder_ids) if self.has_token_ids else None
            delta = ChatDelta(role="assistant", content="")
            told.append(ChatChunkChoice(index=part.index, delta=delta, prompt_token_ids=prompt_ids))
        if part.text or part.spots or part.token_ids:
            told.append(
                ChatChunkChoice(
                    index=part.index,
                    delta=ChatDelta(content=part.text),
                    logprobs=self._logprobs(part),
                    token_ids=list(part.token_ids) if self.has_token_ids else None,
                )
            )
        if part.finish is not None:
            told.append(
                ChatChunkChoice(
                    index=part.index,
                    delta=ChatDelta(),
                    finish_reason=part.shown_finish,
                    stop_reason=part.stop_reason,
                    seed=part.seed,
                )
            )
        return [self._chunk([choice], Ending(usage=usage)) for choice in told]

    def closing(self, ending: Ending) -> ChatChunk:
        """A chunk without choices."""
        return self._chunk([], ending)

    def whole(self, parts: Sequence[Part], ending: Ending) -> BaseModel:
        """All choices."""
        facts = {**self.head.facts(), **ending.facts()}
        choices = [self._choice(part) for part in parts]
        return ChatCompletion.model_validate({**facts, "choices": choices})

    def _choice(self, part: Part) -> ChatChoice:
        assert part.shown_finish is not None  # the whole is told at the end
        first = part.request if self.has_token_ids else None
        return ChatChoice(
            index=part.index,
            message=ChatMessage(content=part.text),
            logprobs=self._logprobs(part),
            finish_reason=part.shown_finish,
            stop_reason=part.stop_reason,
            seed=part.seed,
            score=part.score,
            token_ids=list(part.token_ids) if self.has_token_ids else None,
            prompt_token_ids=list(first.encoder_ids) if first else None,
        )

    def _logprobs(self, part: Part) -> ChatLogprobs | None:
        return None if self.draft.logprobs is None else tell_chat_logprobs(part.spots, self.names)

    def _chunk(self, choices: list[ChatChunkChoice], ending: Ending) -> ChatChunk:
        return ChatChunk.model_validate({**self.head.facts(), **ending.facts(), "choices": choices})


CHAT = Route("chatcmpl", "messages", ChatStyle)


def add_chat_route(app: FastAPI, gateway: Gateway, template: ChatTemplate | None) -> None:
    """Serve POST /v1/chat/completions with the model's own template, if it has one."""
    route = CHAT if template is None else replace(CHAT, is_quick=False)

    def read(body: ChatRequest) -> Draft:
        return read_chat(body, template, gateway.engine)

    @post(app, "/v1/chat/completions", streamed(ChatCompletion))
    async def create_chat_completion(http: HttpRequest, body: ChatRequest) -> Response:
        """Answer a conversation; with `stream: true` as an event stream."""
        body.check()
        return await write(gateway, http, route, body, read, 1)
