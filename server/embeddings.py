"""POST /v1/embeddings: the mean of what the encoder makes of a text."""

import base64
import sys
from array import array
from collections.abc import Sequence

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from engine.request import Embedded, Event, Pooling, Request, SamplingParams
from server.errors import ApiError
from server.gateway import Admission, Gateway
from server.jobs import json_response
from server.orders import Clerk, Prompt, new_id
from server.replies import count_usage
from server.responses import ERRORS
from server.schemas_generation import bad_field
from server.schemas_native import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage


def encode_base64(vector: Sequence[float]) -> str:
    """Base64 of numbers as little-endian float32, as OpenAI's clients ask for it."""
    numbers = array("f", vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode("ascii")


def build_poolings(
    gateway: Gateway, admission: Admission[EmbeddingRequest], prompts: list[Prompt], reply_id: str
) -> list[Request]:
    """One request for each input. Raises RequestError if one of them can never be served."""
    clerk = Clerk(gateway.engine, admission, reply_id, gateway.settings.max_prompt_chars)
    params = SamplingParams(max_tokens=1)
    return [clerk.request(prompt, params, task=Pooling()) for prompt in prompts]


def find_vector(events: Sequence[Event]) -> tuple[float, ...]:
    """The vector among the events of a request."""
    for event in events:
        if isinstance(event, Embedded):
            return event.vector
    raise ApiError(500, "the engine gave no vector", code="engine_failure")


def add_embedding_route(app: FastAPI, gateway: Gateway) -> None:
    """Serve POST /v1/embeddings."""

    @app.post("/v1/embeddings", response_model=Embeddings, responses=ERRORS)
    async def create_embeddings(http: HttpRequest, body: EmbeddingRequest) -> Response:
        """One vector for each input: the mean of the encoder's output over its tokens."""
        admission = await gateway.admit(http, body)
        prompts = body.prompts()
        most, width = gateway.settings.choices_limit, gateway.engine.config.d_model
        if not 1 <= len(prompts) <= most:
            raise bad_field(f"{len(prompts)} inputs; allowed: 1 to {most} in one request", "input")
        if body.dimensions not in (None, width):
            text = f"dimensions is {body.dimensions}; this model has {width} and no other"
            raise bad_field(text, "dimensions", "unsupported_parameter")
        gateway.require_room(len(prompts), admission)
        reply_id = new_id("embd")
        requests = await gateway.build(
            http, lambda: build_poolings(gateway, admission, prompts, reply_id), "input"
        )
        told = await gateway.collect(http, requests, admission)
        vectors = [find_vector(events) for events in told]
        is_packed = body.encoding_format == "base64"
        usage = count_usage(requests, 0)
        reply = Embeddings(
            model=body.model or admission.chosen.model,
            data=[
                Embedding(index=i, embedding=encode_base64(v) if is_packed else list(v))
                for i, v in enumerate(vectors)
            ],
            usage=EmbeddingUsage(
                prompt_tokens=usage.prompt_tokens, total_tokens=usage.total_tokens
            ),
            adapter=admission.chosen.reference,
        )
        return json_response(reply, admission.headers)
