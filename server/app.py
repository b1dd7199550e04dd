"""The web application: routes and layers around one engine."""

from typing import TYPE_CHECKING

from fastapi import FastAPI

from server.accounts import Accounts
from server.adapters import open_adapters
from server.adapters_admin import add_adapter_routes
from server.chat import add_chat_route
from server.completions import add_completion_routes
from server.docs_page import add_docs_route
from server.embeddings import add_embedding_route
from server.errors import install_handlers
from server.gateway import Gateway
from server.guards import add_guards
from server.health import add_health_routes
from server.info import add_info_route
from server.metrics import Metrics, add_metrics_route
from server.metrics_disk import DiskCollector
from server.middleware import RequestLog
from server.models import add_model_routes
from server.protocol import Engine
from server.score import add_score_route
from server.settings import Settings
from server.templates import ChatTemplate, read_template
from server.tokenization import add_tokenization_routes
from server.usage import add_usage_routes

if TYPE_CHECKING:
    from server.tracing import Tracing  # imported only where traces are wanted


def create_app(
    engine: Engine, settings: Settings | None = None, tracing: "Tracing | None" = None
) -> FastAPI:
    """Build the application around an engine, which it neither starts nor ends."""
    settings = settings or Settings()
    metrics = Metrics(engine)
    metrics.tell_limits(settings.max_queue)
    accounts = Accounts(settings)
    app = FastAPI(
        title="InfMoE",
        docs_url=None,  # the pages of FastAPI fetch their scripts from a foreign host
        redoc_url=None,
        redirect_slashes=False,
    )
    adapters = open_adapters(engine, settings)
    app.state.adapters = adapters  # for who has to know what this server holds
    if adapters is not None:
        metrics.watch_adapters(adapters.store)
    if settings.adapters is not None:
        metrics.registry.register(DiskCollector(settings.adapters))
    gateway = Gateway(engine, settings, metrics, adapters)
    add_text_routes(app, gateway, read_template(settings.model))
    add_model_routes(app, engine, adapters)
    add_adapter_routes(app, adapters, settings)
    add_health_routes(app, engine, settings.keep_alive_s)
    add_metrics_route(app, metrics)
    add_info_route(app, engine, settings, adapters.store if adapters else None)
    add_usage_routes(app, accounts.usage)
    add_docs_route(app)
    install_handlers(app)
    add_guards(app, settings, accounts)
    if tracing is not None:
        app.add_middleware(tracing.layer)
    app.add_middleware(RequestLog, metrics=metrics)  # the last one added is the outermost
    return app


def add_text_routes(app: FastAPI, gateway: Gateway, template: ChatTemplate | None) -> None:
    """Serve all routes that read texts."""
    add_completion_routes(app, gateway)
    add_chat_route(app, gateway, template)
    add_score_route(app, gateway)
    add_embedding_route(app, gateway)
    add_tokenization_routes(app, gateway, template)
