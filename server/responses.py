"""What the OpenAPI document tells of replies: failures that every route has, and streams."""

from pydantic import BaseModel

from server.schemas import ErrorBody

Documented = dict[int | str, dict[str, object]]

REASONS = {
    400: "The body is not understood, out of bounds or asks for what cannot be done",
    401: "No API key, or none that is known",
    403: "The key is not for this route or adapter",
    404: "No such path, model or adapter",
    408: "The body came too slowly",
    413: "The body is too large",
    415: "The body is not declared as JSON",
    421: "The host name is not one of this server's",
    429: "Too many requests or tokens, of this key or of all; Retry-After tells when to come back",
    431: "The headers are too large",
    500: "The engine failed at this request",
    503: "Loading, draining or failed",
    504: "The deadline passed before there was a first token",
}
ERRORS: Documented = {
    status: {"model": ErrorBody, "description": text} for status, text in REASONS.items()
} | {"4XX": {"model": ErrorBody, "description": "Any other mistake of the caller"}}


def streamed(model: type[BaseModel]) -> Documented:
    """The good reply of a route that streams on request, and its failures."""
    stream: dict[str, object] = {"schema": {"type": "string"}}
    return {200: {"model": model, "content": {"text/event-stream": stream}}, **ERRORS}
