"""GET /v1/models: what is served, once it is: the base model and adapters on it."""

import time

from fastapi import FastAPI
from fastapi import Request as HttpRequest

from server.adapters import Adapters, adapter_cards, find_card
from server.errors import ApiError
from server.health import require_ready
from server.protocol import Engine
from server.responses import ERRORS
from server.schemas import ModelCard, ModelList
from server.schemas_adapters import AdapterCard


def no_model(engine: Engine) -> ApiError:
    """A 404 that tells the name of the base model."""
    text = f"no such model; this server has {engine.model_name!r} and what /v1/models lists"
    return ApiError(404, text, code="model_not_found", param="model")


def require_model(engine: Engine, name: str | None) -> None:
    """Raise ApiError (404) if a request names another model than the base."""
    if name is not None and name != engine.model_name:
        raise no_model(engine)


def add_model_routes(app: FastAPI, engine: Engine, adapters: Adapters | None) -> None:
    """Serve the list of models and each model; 503 until there is one."""
    created = int(time.time())

    def base_card() -> ModelCard:
        require_ready(engine)
        longest = engine.config.max_prompt_tokens
        return ModelCard(
            id=engine.model_name,
            created=created,
            root=engine.model_name,
            architecture="decoder_only" if engine.config.is_decoder_only else "encoder_decoder",
            state=engine.state,
            max_model_len=longest,
            max_input_tokens=longest,
            max_decoder_tokens=longest,
        )

    @app.get("/v1/models", responses=ERRORS)
    async def list_models(http: HttpRequest) -> ModelList:
        """All models that this server answers for: the base model first, then adapters."""
        caller = http.scope["state"].get("caller")
        return ModelList(data=[base_card(), *adapter_cards(adapters, engine, caller)])

    @app.get("/v1/models/{model_id:path}", responses=ERRORS)
    async def read_model(http: HttpRequest, model_id: str) -> ModelCard | AdapterCard:
        """One model; its id may contain slashes."""
        found = base_card()
        if model_id == engine.model_name:
            return found
        card = find_card(adapters, engine, model_id, http.scope["state"].get("caller"))
        if card is None:
            raise no_model(engine)
        return card
