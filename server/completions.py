"""POST /v1/completions and POST /v1/generate: texts for the encoder, answers of the decoder."""

from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from server.body_route import post
from server.gateway import Gateway
from server.logprobs import tell_logprobs, tell_prompt_logprobs, tell_tokens
from server.parts import Ending, Part
from server.responses import streamed
from server.schemas import Usage
from server.schemas_completions import (
    Choice,
    Completion,
    CompletionRequest,
    Generated,
    GenerateRequest,
    Generation,
    PromptedBody,
)
from server.writing import Draft, Route, Style, write


def read_prompted(body: PromptedBody, prompts: list[str | list[int]], max_tokens: int) -> Draft:
    """What a body of completions or generate comes to."""
    return Draft(
        prompts=prompts,
        decoder_prompt=body.decoder_prompt,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.prompt_logprobs,
        has_echo=body.echo,
        is_scoring_prompts=body.is_scoring_prompts,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionStyle(Style):
    """Completions as OpenAI tells them."""

    def chunks(self, part: Part, usage: Usage | None) -> Sequence[Completion]:
        """One chunk for each part."""
        return [self._message([self._choice(part)], Ending(usage=usage))]

    def closing(self, ending: Ending) -> Completion:
        """A chunk without choices."""
        return self._message([], ending)

    def whole(self, parts: Sequence[Part], ending: Ending) -> Completion:
        """All choices."""
        return self._message([self._choice(part) for part in parts], ending)

    def _choice(self, part: Part) -> Choice:
        has_prompt = part.prompt is not None and self.draft.prompt_logprobs is not None
        first = part.request if self.has_token_ids else None
        return Choice(
            index=part.index,
            text=part.text,
            logprobs=None if self.draft.logprobs is None else tell_logprobs(part.spots, self.names),
            finish_reason=part.shown_finish,
            stop_reason=part.stop_reason,
            seed=part.seed,
            score=part.score,
            spans=None if part.spans is None else list(part.spans),
            token_ids=list(part.token_ids) if self.has_token_ids else None,
            prompt_token_ids=list(first.encoder_ids) if first else None,
            decoder_prompt_token_ids=list(first.decoder_ids) if first else None,
            prompt_logprobs=tell_prompt_logprobs(part.prompt or (), self.names)
            if has_prompt
            else None,
        )

    def _message(self, choices: list[Choice], ending: Ending) -> Completion:
        return Completion.model_validate(
            {**self.head.facts(), **ending.facts(), "choices": choices}
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationStyle(Style):
    """Answers as our own route tells them."""

    def chunks(self, part: Part, usage: Usage | None) -> Sequence[Generation]:
        """One chunk for each part."""
        return [self._message([self._answer(part)], Ending(usage=usage))]

    def closing(self, ending: Ending) -> Generation:
        """A chunk without answers."""
        return self._message([], ending)

    def whole(self, parts: Sequence[Part], ending: Ending) -> Generation:
        """All answers."""
        return self._message([self._answer(part) for part in parts], ending)

    def _answer(self, part: Part) -> Generated:
        tokens = [spot.token for spot in part.spots]
        has_prompt = part.prompt is not None and self.draft.prompt_logprobs is not None
        first = part.request if self.has_token_ids else None
        return Generated(
            index=part.index,
            text=part.text,
            token_ids=list(part.token_ids),
            spans=None if part.spans is None else list(part.spans),
            tokens=None if self.draft.logprobs is None else tell_tokens(tokens, self.names),
            decoder_tokens=tell_tokens(part.prompt or (), self.names) if has_prompt else None,
            finish_reason=part.shown_finish,
            stop_reason=part.stop_reason,
            seed=part.seed,
            score=part.score,
            encoder_token_ids=list(first.encoder_ids) if first else None,
            decoder_prompt_token_ids=list(first.decoder_ids) if first else None,
        )

    def _message(self, answers: list[Generated], ending: Ending) -> Generation:
        return Generation.model_validate(
            {**self.head.facts(), **ending.facts(), "answers": answers}
        )


COMPLETIONS = Route("cmpl", "prompt", CompletionStyle)
GENERATE = Route("gen", "text", GenerationStyle)


def add_completion_routes(app: FastAPI, gateway: Gateway) -> None:
    """Serve POST /v1/completions and POST /v1/generate."""

    def read_completion(body: CompletionRequest) -> Draft:
        return read_prompted(body, body.prompts(), body.max_tokens)

    def read_generate(body: GenerateRequest) -> Draft:
        return read_prompted(body, body.prompts(), body.max_tokens)

    @post(app, "/v1/completions", streamed(Completion))
    async def create_completion(http: HttpRequest, body: CompletionRequest) -> Response:
        """Continue prompts or fill their blanks; with `stream: true` as an event stream."""
        body.check()
        return await write(gateway, http, COMPLETIONS, body, read_completion, len(body.prompts()))

    @post(app, "/v1/generate", streamed(Generation))
    async def create_generation(http: HttpRequest, body: GenerateRequest) -> Response:
        """The same with the encoder's and the decoder's part by their names (extension)."""
        body.check()
        return await write(gateway, http, GENERATE, body, read_generate, len(body.prompts()))
