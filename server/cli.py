"""`infmoe serve`."""

import logging
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import ConfigError
from server.app import create_app
from server.lifecycle import is_loopback, open_socket, run_to_exit
from server.protocol import Engine
from server.settings import DtypeName, LogLevel, Settings, read_settings

logger = logging.getLogger(__name__)


def open_engine(model: Path, settings: Settings) -> Engine:
    """Start the engine of a model directory; it loads in a thread of its own."""
    # Not at the top: torch takes seconds; neither --help nor a taken port should wait for it.
    from engine.loading import load_within, read_storage
    from engine.model.dtypes import parse_dtype
    from engine.planning import MemoryPlan
    from engine.routing import record_routing
    from engine.scheduler import Limits
    from engine.tokenizer import open_tokenizer
    from engine.worker import LoadedModel, Worker

    def log_plan(plan: MemoryPlan) -> None:
        for line in plan.summary():
            logger.info(line)

    def load(report_phase: Callable[[str], None]) -> LoadedModel:
        report_phase("reading weights")
        # before the weights: its dictionary is memory of the process, which the plan counts
        tokenizer = open_tokenizer(model, read_storage(model).config.tokenizer)
        loaded = load_within(
            model,
            parse_dtype(settings.dtype),
            settings.memory,
            settings.gpu_memory,
            report_phase,
            log_plan,
        )
        close = loaded.close
        if settings.record_routing is not None:
            recorder, path = record_routing(loaded.model), settings.record_routing

            def close() -> None:
                loaded.close()
                recorder.save(path)
                logger.info("the routing is in %s", path)

        return LoadedModel(loaded.model, tokenizer, loaded.experts, loaded.plan, close)

    worker = Worker(
        model.resolve().name,
        load,
        max_queue=settings.max_queue,
        limits=Limits(max_rows=settings.max_rows),
    )
    worker.start()
    return worker


def configure_logging(level: str) -> None:
    """Plain lines on standard error, for our own modules and for uvicorn."""
    line = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    logging.basicConfig(level=level.upper(), format=line)
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger().level))


def greeting(listener: socket.socket) -> str:
    """Where the server listens and how to try it, in one line."""
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    json = '{"prompt": "Hello", "max_tokens": 32}'
    curl = f"curl {address}/v1/completions -H 'content-type: application/json' -d '{json}'"
    return f"infmoe: listening on {address}; when it is ready, try: {curl}"


def serve(  # noqa: PLR0913  the options are the interface
    model: Annotated[
        Path | None, typer.Argument(help="Model directory; INFMOE_MODEL if left out.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[
        int | None, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65_535)
    ] = None,
    dtype: Annotated[DtypeName | None, typer.Option(help="Default: as stored.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Host memory to keep within, all told: 24GiB.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Compute on the GPU, within this much of its memory.")
    ] = None,
    max_rows: Annotated[
        int | None, typer.Option(help="Requests that decode together.", min=1, max=4096)
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Requests that may wait; more get 429.", min=1)
    ] = None,
    record_routing: Annotated[
        Path | None, typer.Option(help="Write which experts were wanted, for infmoe simulate.")
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="Least level to log.")] = None,
) -> None:
    """Serve a model over HTTP, as OpenAI clients expect it.

    Options win over the environment: INFMOE_HOST, INFMOE_PORT and so on.
    """
    settings = read_settings(
        model=model,
        host=host,
        port=port,
        dtype=dtype,
        memory=memory,
        gpu_memory=gpu_memory,
        max_rows=max_rows,
        max_queue=max_queue,
        record_routing=record_routing,
        log_level=log_level,
    )
    if settings.model is None:
        raise typer.BadParameter("give a model directory or set INFMOE_MODEL", param_hint="MODEL")
    if not settings.model.is_dir():
        raise ConfigError(f"{settings.model} is not a directory")
    if settings.record_routing is not None:
        from engine.routing import check_trace_path  # not at the top: see open_engine

        check_trace_path(settings.record_routing)
    configure_logging(settings.log_level)
    if not is_loopback(settings.host):
        logger.warning("listening on %s without authentication", settings.host)
    with open_socket(settings.host, settings.port) as listener:
        typer.echo(greeting(listener), err=True)
        engine = open_engine(settings.model, settings)
        run_to_exit(create_app(engine, settings), engine, listener, settings.drain_s)
