"""The web application: routes and layers around one engine."""

from fastapi import FastAPI

from server.completions import add_completion_routes
from server.errors import install_handlers
from server.health import add_health_routes
from server.info import add_info_route
from server.metrics import Metrics, add_metrics_route
from server.middleware import BodyGuard, RequestLog
from server.models import add_model_routes
from server.protocol import Engine
from server.settings import Settings


def create_app(engine: Engine, settings: Settings | None = None) -> FastAPI:
    """Build the application around an engine, which it neither starts nor ends."""
    settings = settings or Settings()
    metrics = Metrics(engine)
    app = FastAPI(
        title="InfMoE",
        docs_url=None,  # the pages of FastAPI fetch their scripts from a foreign host
        redoc_url=None,
        redirect_slashes=False,
    )
    add_completion_routes(app, engine, settings, metrics)
    add_model_routes(app, engine)
    add_health_routes(app, engine)
    add_metrics_route(app, metrics)
    add_info_route(app, engine, settings)
    install_handlers(app)
    app.add_middleware(BodyGuard, max_body_bytes=settings.max_body_bytes)
    app.add_middleware(RequestLog, metrics=metrics)  # the last one added is the outermost
    return app
