"""Routes of which each request costs: one JSON body in, one response out, nothing between.

FastAPI finds out for each request anew what its function takes; that is a fifth of the gateway's
time. What it documents stays.
"""

import json
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ValidationError

B = TypeVar("B", bound=BaseModel)
Handler = Callable[[Request, B], Awaitable[Response]]

MISSING = {"type": "missing", "loc": ("body",), "msg": "Field required"}


class BodyRoute(APIRoute):
    """A route whose function takes `http`, the request, and `body`, a model."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What answers a request."""
        answer = self.endpoint
        kind: type[BaseModel] = answer.__annotations__["body"]

        async def handle(request: Request) -> Response:
            response: Response = await answer(request, read_body(kind, await request.body()))
            return response

        return handle


def read_body(kind: type[B], body: bytes) -> B:
    """A body as a model, with the failures that FastAPI has for it.

    Raises RequestValidationError, or HTTPException (400) for what is not even text.
    """
    try:
        value = json.loads(body) if body else None
    except json.JSONDecodeError as error:
        where, context = ("body", error.pos), {"error": error.msg}
        told = {"type": "json_invalid", "loc": where, "msg": "JSON decode error", "ctx": context}
        raise RequestValidationError([told]) from error
    except (ValueError, RecursionError) as error:
        raise HTTPException(400) from error
    if value is None:
        raise RequestValidationError([MISSING])
    try:
        # as FastAPI has it: else failures name our classes
        return kind.model_validate(value, from_attributes=True)
    except ValidationError as error:
        found = error.errors(include_url=False, include_input=False)
        placed = [{**one, "loc": ("body", *one["loc"])} for one in found]
        raise RequestValidationError(placed) from error


def post(
    app: FastAPI, path: str, responses: Mapping[int | str, Mapping[str, Any]]
) -> Callable[[Handler[B]], Handler[B]]:
    """Make a function answer POST at a path, as `FastAPI.post` does."""

    def add(answer: Handler[B]) -> Handler[B]:
        app.router.add_api_route(
            path,
            answer,
            methods=["POST"],
            response_model=None,
            responses={status: dict(told) for status, told in responses.items()},
            route_class_override=BodyRoute,
        )
        return answer

    return add
