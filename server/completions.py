"""POST /v1/completions: from a body to requests of the engine, from their events to the reply."""

import json
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from urllib.parse import quote

import anyio
from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from engine.errors import EngineError
from engine.generation import require_choice
from engine.prompt import build_request
from engine.request import Request
from server.errors import api_error
from server.health import require_ready
from server.logprobs import NameToken
from server.metrics import Meter, Metrics
from server.models import ERRORS, require_model
from server.protocol import Engine, EventStream
from server.replies import Reply, new_id
from server.schemas import Completion, CompletionRequest
from server.settings import Settings
from server.streams import DONE, PING, Merge, SseResponse, data_frame, until_disconnect

logger = logging.getLogger(__name__)

TOKENIZER_THREADS = 2
MAX_NAMED_CHARS = 64


class Completions:
    """The completions of one engine."""

    def __init__(self, engine: Engine, settings: Settings, metrics: Metrics) -> None:
        self._engine = engine
        self._settings = settings
        self._metrics = metrics
        self._tokenizers = anyio.CapacityLimiter(TOKENIZER_THREADS)

    async def create(self, http: HttpRequest, body: CompletionRequest) -> Response:
        """Continue prompts or fill their blanks; with `stream: true` as an event stream."""
        require_ready(self._engine)
        require_model(self._engine, body.model)
        body.check(self._settings.choices_limit)
        reply_id = new_id()
        # Tokenizing is work for a processor; on the event loop it would hold up all other streams.
        requests = await anyio.to_thread.run_sync(
            self._build, body, reply_id, limiter=self._tokenizers
        )
        notes = http.scope["state"]["notes"]
        notes["completion"] = reply_id
        name_token = token_names(self._engine, as_ids=body.return_tokens_as_token_ids)
        reply = Reply(reply_id, self._engine.model_name, requests, body.n, name_token)
        merge = Merge(await self._submit(requests))
        job = Job(reply, merge, Meter(self._metrics), notes)
        headers = ignored_header(body.ignored_fields())
        if body.stream:
            with_usage = body.stream_options is not None and body.stream_options.include_usage
            return SseResponse(
                merge, job.frames(self._settings.keep_alive_s, with_usage=with_usage), headers
            )
        async with merge:
            whole = await until_disconnect(http.receive, job.whole())
        return Response(whole.model_dump_json(), 200, headers, media_type="application/json")

    def _build(self, body: CompletionRequest, reply_id: str) -> list[Request]:
        tokenizer, config = self._engine.tokenizer, self._engine.config
        samples = body.samples()
        requests: list[Request] = []
        for prompt in body.prompts():
            first = build_request(prompt, tokenizer, config, samples[0], reply_id, fill=body.fill)
            require_choice(first, tokenizer, config)
            for params in samples:
                name = f"{reply_id}-{len(requests)}"
                requests.append(replace(first, request_id=name, params=params))
        return requests

    async def _submit(self, requests: list[Request]) -> list[EventStream]:
        streams: list[EventStream] = []
        try:
            for request in requests:
                streams.append(self._engine.submit(request))
        except EngineError:  # all or none
            for stream in streams:
                await stream.aclose()
            raise
        return streams


class Job:
    """One HTTP request on its way through the engine."""

    def __init__(self, reply: Reply, merge: Merge, meter: Meter, notes: dict[str, object]) -> None:
        self._reply = reply
        self._merge = merge
        self._meter = meter
        self._notes = notes

    async def whole(self) -> Completion:
        """Wait for all events. Raises ApiError if the engine gave up a request."""
        async for _ in self._chunks():
            pass
        return self._reply.whole()

    async def frames(self, ping_s: float, *, with_usage: bool) -> AsyncIterator[bytes]:
        """The reply as server-sent events; failures are told in them, since the status is sent."""
        try:
            async for chunk in self._chunks(ping_s):
                yield PING if chunk is None else data_frame(chunk.model_dump_json())
            if with_usage:
                yield data_frame(self._reply.usage_chunk().model_dump_json())
        except Exception as error:
            problem = api_error(error)
            self._notes["error"] = problem.code
            if problem.status == 500:
                logger.warning("%s: %s", self._reply.id, error)
            yield data_frame(json.dumps(problem.body()))
            yield DONE
            if problem.code == "internal_error":  # a bug: the log needs its traceback
                raise
        else:
            yield DONE

    async def _chunks(self, ping_s: float | None = None) -> AsyncIterator[Completion | None]:
        async for item in self._merge.events(ping_s):
            if item is None:
                yield None
                continue
            index, event = item
            self._meter.see(index, event)
            yield self._reply.take(index, event)
        self._notes.update(self._reply.account(), ttft_ms=self._meter.first_token_ms())


def token_names(engine: Engine, *, as_ids: bool) -> NameToken:
    """How to name tokens in log-probabilities: by their text, which two may share, or by id."""
    if as_ids:
        return lambda token_id: f"token_id:{token_id}"
    # an end mark has no text
    return lambda token_id: engine.tokenizer.decode([token_id]) or f"token_id:{token_id}"


def ignored_header(names: list[str]) -> dict[str, str]:
    """The header that names fields without a meaning here."""
    if not names:
        return {}
    short = [quote(name[:MAX_NAMED_CHARS], errors="replace") for name in names]
    return {"x-ignored-fields": ",".join(short)}


def add_completion_routes(
    app: FastAPI, engine: Engine, settings: Settings, metrics: Metrics
) -> None:
    """Serve POST /v1/completions."""
    stream: dict[str, object] = {"schema": {"type": "string"}}
    ok: dict[str, object] = {"model": Completion, "content": {"text/event-stream": stream}}
    app.add_api_route(
        "/v1/completions",
        Completions(engine, settings, metrics).create,
        methods=["POST"],
        response_model=None,
        responses={200: ok, **ERRORS},
    )
