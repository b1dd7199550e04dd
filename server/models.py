"""GET /v1/models: what is served, once it is."""

import time

from fastapi import FastAPI

from server.errors import ApiError
from server.health import require_ready
from server.protocol import Engine
from server.schemas import ErrorBody, ModelCard, ModelList

ERRORS: dict[int | str, dict[str, object]] = {
    "4XX": {"model": ErrorBody},
    "5XX": {"model": ErrorBody},
}


def require_model(engine: Engine, name: str | None) -> None:
    """Raise ApiError (404) if a request names another model than the served one."""
    if name is not None and name != engine.model_name:
        text = f"no such model; this server has {engine.model_name!r}"
        raise ApiError(404, text, code="model_not_found", param="model")


def add_model_routes(app: FastAPI, engine: Engine) -> None:
    """Serve the list of models and each model; 503 until there is one."""
    created = int(time.time())

    def card() -> ModelCard:
        require_ready(engine)
        return ModelCard(id=engine.model_name, created=created)

    @app.get("/v1/models", responses=ERRORS)
    async def list_models() -> ModelList:
        """All models that this server answers for."""
        return ModelList(data=[card()])

    @app.get("/v1/models/{model_id:path}", responses=ERRORS)
    async def read_model(model_id: str) -> ModelCard:
        """One model; its id may contain slashes."""
        found = card()
        require_model(engine, model_id)
        return found
