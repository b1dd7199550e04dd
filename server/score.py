"""POST /v1/score: how likely the model finds given continuations of given texts."""

from collections.abc import Sequence

import anyio
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from engine.demands import check_task
from engine.errors import RequestError
from engine.request import Continuations, Event, Finished, Request, SamplingParams, Score, Scored
from server.errors import ApiError
from server.gateway import Admission, Gateway
from server.jobs import json_response
from server.logprobs import LOWEST, TokenNames
from server.orders import Clerk, Prompt, new_id
from server.parts import Head
from server.replies import count_usage, tell_timings
from server.responses import ERRORS
from server.schemas_generation import bad_field
from server.schemas_native import ContextScores, ContinuationScore, ScoreRequest, Scores


def read_choices(gateway: Gateway, body: ScoreRequest) -> tuple[tuple[int, ...], ...]:
    """The continuations as ids. Raises ApiError (400) for one without a token."""
    encode = gateway.engine.tokenizer.encode
    most = gateway.settings.max_prompt_chars
    if sum(len(text) for text in body.continuations) > most:
        raise bad_field(f"the continuations are longer than {most:,} in all", "continuations")
    choices = [encode(one) if isinstance(one, str) else one for one in body.continuations]
    if not all(choices):
        raise bad_field("a continuation is empty; give at least one token", "continuations")
    return tuple(tuple(ids) for ids in choices)


def build_scores(
    gateway: Gateway, admission: Admission[ScoreRequest], contexts: list[Prompt], reply_id: str
) -> list[Request]:
    """One request for each context. Raises RequestError if one of them can never be served."""
    body, engine = admission.body, gateway.engine
    task = Continuations(choices=read_choices(gateway, body), top=body.logprobs or 0)
    clerk = Clerk(engine, admission, reply_id, gateway.settings.max_prompt_chars)
    requests = []
    for context in contexts:
        request = clerk.request(
            context,
            SamplingParams(max_tokens=1),
            body.decoder_prompt,
            fill=body.fill,
            is_closed=body.add_special_tokens,
            task=task,
        )
        requests.append(request)
        try:
            check_task(request, engine.config)
        except RequestError as error:
            if error.field == "choices":
                error.field = "continuations"
            raise
    return requests


def tell_score(
    index: int, ids: tuple[int, ...], score: Score, names: TokenNames, *, has_top: bool
) -> ContinuationScore:
    """One continuation; a closing sentinel, which is scored as well, is one more token."""
    tops = [[(i, max(value, LOWEST)) for i, value in token.top] for token in score.tokens]
    return ContinuationScore(
        index=index,
        logprob=max(score.total, LOWEST * len(score.logprobs)),
        is_greedy=score.is_greedy,
        token_ids=list(ids),
        tokens=[names.name(token_id) for token_id in ids],
        token_logprobs=[max(value, LOWEST) for value in score.logprobs],
        top_logprobs=tops if has_top else None,
    )


def tell_scores(
    head: Head,
    requests: Sequence[Request],
    told: Sequence[Sequence[Event]],
    names: TokenNames,
    *,
    has_top: bool,
) -> Scores:
    """The reply; of many contexts, continuations and likeliest tokens it takes a while.

    Raises ApiError if the engine told no scores.
    """
    data = []
    for index, (request, events) in enumerate(zip(requests, told, strict=True)):
        scores = next((event.scores for event in events if isinstance(event, Scored)), None)
        if scores is None:
            raise ApiError(500, "the engine gave no scores", code="engine_failure")
        assert isinstance(request.task, Continuations)
        pairs = zip(request.task.choices, scores, strict=True)
        each = [
            tell_score(i, ids, score, names, has_top=has_top)
            for i, (ids, score) in enumerate(pairs)
        ]
        data.append(ContextScores(index=index, scores=each))
    ends = [event for events in told for event in events if isinstance(event, Finished)]
    usage = count_usage(requests, 0, sum(end.cached_tokens for end in ends))
    return Scores.model_validate(
        {**head.facts(), "data": data, "usage": usage, "timings": tell_timings(ends)}
    )


def add_score_route(app: FastAPI, gateway: Gateway) -> None:
    """Serve POST /v1/score."""

    @app.post("/v1/score", response_model=Scores, responses=ERRORS)
    async def score_continuations(http: HttpRequest, body: ScoreRequest) -> Response:
        """Log-probabilities of continuations, token by token; nothing is generated (extension)."""
        contexts = body.prompts()
        admission = await gateway.admit(http, body)
        most = gateway.settings.choices_limit
        if not 1 <= len(contexts) <= most:
            raise bad_field(f"{len(contexts)} contexts; allowed: 1 to {most}", "contexts")
        gateway.require_room(len(contexts), admission)
        reply_id = new_id("score")
        requests = await gateway.build(
            http, lambda: build_scores(gateway, admission, contexts, reply_id), "context"
        )
        told = await gateway.collect(http, requests, admission)
        head = gateway.head(reply_id, admission.chosen, body.model)
        names = TokenNames(gateway.engine.tokenizer)
        has_top = body.logprobs is not None
        reply = await anyio.to_thread.run_sync(
            lambda: tell_scores(head, requests, told, names, has_top=has_top)
        )
        return json_response(reply, admission.headers)
