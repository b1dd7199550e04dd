"""`infmoe serve`."""

import logging
import socket
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from engine.errors import ConfigError
from engine.garbage import spare_modules
from engine.model_paths import find_gguf, find_model, model_title
from engine.options import EngineOptions
from engine.remote_process import EngineProcess, spawn_engine
from server.keys import read_keys
from server.lifecycle import leave_on_signals, open_socket, run_to_exit
from server.log_format import configure_logging, say
from server.settings import DtypeName, LogLevel, Settings, is_loopback
from server.settings_sources import join_settings, parse_assignments, print_settings

if TYPE_CHECKING:
    from server.protocol import Engine
    from server.tracing import Tracing

logger = logging.getLogger(__name__)


def options_of(model: Path, settings: Settings) -> EngineOptions:
    """What the settings say of the engine."""
    return EngineOptions(
        model=model,
        name=settings.model_name or model_title(model),
        dtype=settings.dtype,
        memory=settings.memory,
        gpu_memory=settings.gpu_memory,
        adapter_memory=settings.adapter_memory if settings.adapters else 0,
        max_rows=settings.max_rows,
        max_model_len=settings.max_model_len,
        max_queue=settings.max_queue,
        max_queue_tokens=settings.max_queue_tokens,
        encoder_cache=settings.encoder_cache,
        invariant=settings.invariant,
        record_routing=settings.record_routing,
        stall_s=settings.stall_s,
        threads=settings.threads,
    )


def open_engine(model: Path, settings: Settings) -> "Engine":
    """Start the engine of a model directory; it loads in a thread of its own."""
    # Not at the top: torch takes seconds; neither --help nor a taken port should wait for it.
    from engine.opening import start_worker

    return start_worker(options_of(model, settings))


def open_remote_engine(child: EngineProcess, model: Path, settings: Settings) -> "Engine":
    """Have the process that was started for it load a model directory."""
    from engine.loading import gateway_bytes  # not at the top: as above
    from engine.remote import RemoteEngine

    options = options_of(model, settings)
    beside_bytes = gateway_bytes() + options.adapter_memory
    engine = RemoteEngine(child, replace(options, beside_bytes=beside_bytes))
    engine.start()
    return engine


def make_tracing(settings: Settings, model_name: str) -> "Tracing | None":
    """Where traces go, if anywhere. Raises ConfigError if that is no address or OTel is missing."""
    if settings.otlp_endpoint is None:
        return None
    try:
        from server.tracing import open_tracing  # not at the top: its packages are an extra
    except ImportError as error:
        raise ConfigError(
            f"setting otlp_endpoint: {error}; pip install 'infmoe[otel]' has what it needs"
        ) from error
    return open_tracing(settings.otlp_endpoint, model_name)


def greeting(listener: socket.socket) -> str:
    """Where the server listens and how to try it, in one line."""
    host, port = listener.getsockname()[:2]
    address = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    json = '{"prompt": "Hello", "max_tokens": 32}'
    curl = f"curl {address}/v1/completions -H 'content-type: application/json' -d '{json}'"
    return f"listening on {address}; when it is ready, try: {curl}"


def serve(  # noqa: PLR0913  the options are the interface
    model: Annotated[
        Path | None,
        typer.Argument(help="Model directory, GGUF file, or smollm2; else INFMOE_MODEL."),
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
    keys_file: Annotated[
        Path | None, typer.Option(help="Keys of the callers; `infmoe keys` writes it.")
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="Serve everybody, on any address.")
    ] = False,
    adapters: Annotated[
        Path | None, typer.Option(help="Directory of soft prompts, which is watched.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as NAME=VALUE.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; INFMOE_CONFIG if left out.")
    ] = None,
    is_print: Annotated[
        bool, typer.Option("--print-config", help="Print all settings with their origins and end.")
    ] = False,
) -> None:
    """Serve a model over HTTP, as OpenAI clients expect it.

    Options win over the environment (INFMOE_HOST, INFMOE_PORT and so on), that over the file.
    """
    options: dict[str, object] = {
        "model": model,
        "host": host,
        "port": port,
        "dtype": dtype,
        "memory": memory,
        "gpu_memory": gpu_memory,
        "max_rows": max_rows,
        "max_queue": max_queue,
        "record_routing": record_routing,
        "log_level": log_level,
        "keys_file": keys_file,
        "allow_unauthenticated": allow_unauthenticated or None,
        "adapters": adapters,
        **parse_assignments(assignments or ()),
    }
    settings, origins = join_settings(options, config)
    if is_print:
        typer.echo(print_settings(settings, origins))
        return
    start(settings)


def with_found_model(settings: Settings) -> Settings:
    """The settings with the path of the model and the name it is served by.

    Raises ConfigError if there is no model at that path, CheckpointError if its package is missing.
    """
    assert settings.model is not None  # the caller's check
    found = find_model(settings.model)
    if not found.is_dir() and find_gguf(found) is None:
        raise ConfigError(f"{found} is not a directory, nor a GGUF file")
    name = settings.model_name or model_title(settings.model)
    return settings.model_copy(update={"model": found, "model_name": name})


def start(settings: Settings) -> None:
    """Serve until the end. Raises ConfigError if that is not possible with such settings."""
    if settings.model is None:
        raise typer.BadParameter("give a model directory or set INFMOE_MODEL", param_hint="MODEL")
    settings = with_found_model(settings)
    assert settings.model is not None
    assert settings.model_name is not None
    settings.require_safe()
    if settings.keys_file is not None:
        read_keys(settings.keys_file)  # what is wrong with it is told before anything is loaded
    if settings.record_routing is not None:
        from engine.routing import check_trace_path  # not at the top: see open_engine

        check_trace_path(settings.record_routing)
    configure_logging(settings.log_level, settings.log_format)
    tracing = make_tracing(settings, settings.model_name)
    if not settings.has_keys and not is_loopback(settings.host):
        logger.warning("listening on %s without authentication", settings.host)
    with open_socket(settings.host, settings.port) as listener:
        say(logging.INFO, greeting(listener))
        leave_on_signals()
        # before what takes seconds to import: it does the same at the same time
        child = spawn_engine() if settings.has_engine_process else None
        from server.app import create_app  # not at the top: see open_engine

        if child is None:
            engine = open_engine(settings.model, settings)
        else:
            engine = open_remote_engine(child, settings.model, settings)
        app = create_app(engine, settings, tracing)
        spare_modules()
        close = tracing.close if tracing is not None else lambda: None
        run_to_exit(app, engine, listener, settings.drain_s, settings.drain_delay_s, close)
