"""`infmoe ray`."""

import logging
import os
from pathlib import Path
from typing import Annotated

import typer

from engine.errors import ConfigError
from engine.model_paths import find_gguf
from server.cli import greeting
from server.keys import read_keys
from server.lifecycle import open_socket
from server.log_format import configure_logging, say
from server.ray_cluster import Cluster
from server.settings import LogLevel, Settings
from server.settings_sources import join_settings, parse_assignments

logger = logging.getLogger(__name__)


def ray(  # noqa: PLR0913  the options are the interface
    model: Annotated[
        Path | None, typer.Argument(help="Model directory; INFMOE_MODEL if left out.")
    ] = None,
    replicas: Annotated[int, typer.Option(help="Servers of the model, each with all of it.")] = 2,
    max_replicas: Annotated[
        int | None, typer.Option(help="As many where requests wait; default: no more.")
    ] = None,
    replica_cpus: Annotated[float, typer.Option(help="CPUs of each.", min=0)] = 1.0,
    replica_gpus: Annotated[
        float | None, typer.Option(help="GPUs of each; default: 1 with --gpu-memory.", min=0)
    ] = None,
    address: Annotated[
        str | None, typer.Option(help="A Ray that runs: deploy there, or update, and end.")
    ] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", min=0, max=65_535)] = None,
    memory: Annotated[
        str | None, typer.Option(help="Host memory of each replica, all told: 24GiB.")
    ] = None,
    gpu_memory: Annotated[
        str | None, typer.Option(help="Compute on the GPU, within this much of its memory.")
    ] = None,
    log_level: Annotated[LogLevel | None, typer.Option(help="Least level to log.")] = None,
    keys_file: Annotated[Path | None, typer.Option(help="Keys of the callers.")] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="Serve everybody, on any address.")
    ] = False,
    adapters: Annotated[
        Path | None, typer.Option(help="Directory of soft prompts that all replicas see.")
    ] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", help="Any other setting, as NAME=VALUE.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="TOML file of settings; INFMOE_CONFIG if left out.")
    ] = None,
) -> None:
    """Serve a model by several replicas on Ray Serve, in front of them one address.

    Without --address it starts a Ray of its own on this machine and serves until it is told to
    end. Settings are those of `infmoe serve`, each replica for itself.
    """
    options: dict[str, object] = {
        "model": model,
        "host": host,
        "port": port,
        "memory": memory,
        "gpu_memory": gpu_memory,
        "log_level": log_level,
        "keys_file": keys_file,
        "allow_unauthenticated": allow_unauthenticated or None,
        "adapters": adapters,
        **parse_assignments(assignments or ()),
    }
    settings = with_whole_paths(join_settings(options, config)[0])
    check(settings, address)
    gpus = replica_gpus if replica_gpus is not None else float(settings.gpu_memory is not None)
    cluster = Cluster(
        replicas=replicas,
        max_replicas=replicas if max_replicas is None else max_replicas,
        replica_cpus=replica_cpus,
        replica_gpus=gpus,
        address=address,
    )
    require_ray()
    start(settings, cluster)


def with_whole_paths(settings: Settings) -> Settings:
    """The same for processes that work elsewhere."""
    names = ("model", "adapters", "keys_file")
    paths = {name: path.absolute() for name in names if (path := getattr(settings, name))}
    return settings.model_copy(update=paths)


def check(settings: Settings, address: str | None) -> None:
    """Tell what is wrong before Ray starts. On a cluster the files may be on other machines only.

    Raises ConfigError.
    """
    if settings.model is None:
        raise typer.BadParameter("give a model directory or set INFMOE_MODEL", param_hint="MODEL")
    if settings.record_routing is not None:
        raise ConfigError("record_routing writes one file, which replicas cannot share")
    settings.require_safe()
    if address is None:
        if not settings.model.is_dir() and find_gguf(settings.model) is None:
            raise ConfigError(f"{settings.model} is not a directory, nor a GGUF file")
        if settings.keys_file is not None:
            read_keys(settings.keys_file)


def require_ray() -> None:
    """Raise ConfigError without Ray. With it: it reports nothing to anybody."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray.serve  # noqa: F401  only to see whether it is there
    except ImportError as error:
        raise ConfigError(f"{error}; pip install 'infmoe[ray]' has what it needs") from error


def start(settings: Settings, cluster: Cluster) -> None:
    """Deploy, and without an address serve until a signal, then drain."""
    # not at the top: Ray is an extra
    from server.ray_serve import connected, deploy, drain, wait_for_signal

    configure_logging(settings.log_level, settings.log_format)
    told = "deployed"
    if cluster.address is None:
        with open_socket(settings.host, settings.port) as listener:  # also finds a free one for 0
            settings = settings.model_copy(update={"port": listener.getsockname()[1]})
            told = greeting(listener)
    with connected(settings, cluster):
        deploy(settings, cluster)
        say(logging.INFO, told)
        if cluster.address is None:
            number = wait_for_signal()
            logger.info("draining for up to %.0f s", settings.drain_s)
            drain(settings, number)
