"""From a body that asks for text to the reply, the same for completions, chat and generate."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from engine.request import SamplingParams
from server.gateway import Admission, Gateway
from server.jobs import Wording
from server.logprobs import TokenNames
from server.orders import Clerk, Prompt, find_constraint, new_id
from server.parts import Head, Order
from server.protocol import Engine
from server.schemas_generation import GenerationBody, bad_field

G = TypeVar("G", bound=GenerationBody)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What a body comes to, whatever route it came by: texts, how much to write, what to tell."""

    prompts: list[Prompt]
    decoder_prompt: Prompt = ""
    max_tokens: int
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    has_echo: bool = False
    is_scoring_prompts: bool = False

    @property
    def asked_prompt_logprobs(self) -> int | None:
        """Likeliest tokens to ask for at each place of what the decoder is given."""
        is_read = bool(self.decoder_prompt) or self.is_scoring_prompts
        echoed = self.logprobs if self.has_echo and is_read else None
        asked = [top for top in (self.prompt_logprobs, echoed) if top is not None]
        return max(asked, default=None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Style(Wording):
    """How the texts of one body are told; each route has its own."""

    head: Head
    names: TokenNames
    draft: Draft
    has_token_ids: bool


@dataclass(frozen=True, slots=True)
class Route:
    """One route that writes text: the kind of its ids, how it reads a body and words a reply.

    `is_quick` says that a short body is read in no time, as it is not where a template is run.
    """

    kind: str
    prompt_field: str
    style: type[Style]
    is_quick: bool = True


async def write(
    gateway: Gateway,
    http: HttpRequest,
    route: Route,
    body: G,
    read: Callable[[G], Draft],
    num_prompts: int,
) -> Response:
    """Answer a body; `read` is called in a thread, but where that is known to be needless."""
    admission = await gateway.admit(http, body)
    given = body.model_fields_set
    body.check_choices(num_prompts, gateway.settings.choices_limit, route.prompt_field)
    body = admission.body
    gateway.require_room(num_prompts * body.num_samples, admission)
    constraint = find_constraint(body)
    grammar = None
    if constraint is not None:
        grammar = await gateway.compile(http, lambda: constraint.compile(gateway.engine))
    reply_id = new_id(route.kind, body.request_id)

    def build() -> tuple[Draft, Order]:
        draft = read(body)
        if "min_tokens" not in given:
            require_length(admission, draft.max_tokens)
        params = body.sampling(draft.max_tokens, draft.logprobs, draft.asked_prompt_logprobs)
        if grammar is not None:
            params = replace(params, grammar=grammar)
        return draft, make_order(gateway, admission, draft, params, reply_id)

    is_quick = route.is_quick and grammar is None and not body.has_token_rules
    draft, order = await gateway.build(http, build, route.prompt_field, is_quick=is_quick)
    style = route.style(
        head=gateway.head(reply_id, admission.chosen, body.model),
        names=TokenNames(gateway.engine.tokenizer, as_ids=body.return_tokens_as_token_ids),
        draft=draft,
        has_token_ids=body.return_token_ids,
    )
    return await gateway.answer(http, order, admission, style)


def require_length(admission: Admission[G], max_tokens: int) -> None:
    """Raise ApiError (400) if the adapter presets more tokens than the request lets it make."""
    least = admission.body.min_tokens
    if least > max(max_tokens, 1):
        text = (
            f"max_tokens is {max_tokens}, and the adapter {admission.chosen.reference} presets "
            f"min_tokens {least}; give min_tokens as well, or a higher max_tokens"
        )
        raise bad_field(text, "max_tokens")


def make_order(
    gateway: Gateway,
    admission: Admission[G],
    draft: Draft,
    params: SamplingParams,
    reply_id: str,
) -> Order:
    """All requests for a draft. Raises RequestError if one of them can never be served."""
    clerk = Clerk(gateway.engine, admission, reply_id, gateway.settings.max_prompt_chars)
    order = clerk.order(admission.body, draft.prompts, params, draft.decoder_prompt)
    echo = find_echo(draft, gateway.engine) if draft.has_echo else ()
    return replace(order, echo=echo, is_silent=draft.max_tokens == 0)


def find_echo(draft: Draft, engine: Engine) -> tuple[str, ...]:
    """What the text for each prompt begins with: all that the decoder reads and has not made."""

    def text_of(given: Prompt) -> str:
        return given if isinstance(given, str) else engine.tokenizer.decode(given)

    decoder_prompt = text_of(draft.decoder_prompt)
    if draft.is_scoring_prompts or engine.config.is_decoder_only:
        return tuple(text_of(prompt) + decoder_prompt for prompt in draft.prompts)
    return (decoder_prompt,) * len(draft.prompts)
