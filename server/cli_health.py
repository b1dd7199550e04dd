"""`infmoe health`: what a container asks about its own server, without loading anything."""

import http.client
import json
import os
from collections.abc import Mapping
from typing import Annotated
from urllib.parse import urlsplit

import typer

from engine.errors import EngineError

TIMEOUT_S = 2.5  # below that of the container's check
PATIENCE_S = 300.0
MAX_BYTES = 65_536
EVERYWHERE = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


class Unhealthy(EngineError):
    """The server is neither ready nor on its way there."""


def health(
    url: Annotated[
        str | None, typer.Argument(help="Default: where INFMOE_HOST and INFMOE_PORT say.")
    ] = None,
    patience: Annotated[
        float, typer.Option(help="Seconds that loading may go on without a byte.", min=1)
    ] = PATIENCE_S,
) -> None:
    """Tell whether a server is ready, or loads its model and comes on.

    Exits with 0 if so. Draining, failed, stuck or silent is 1.
    """
    typer.echo(check_health(url or own_address(os.environ), patience))


def own_address(environment: Mapping[str, str]) -> str:
    """Where a server with these variables is reached from its own machine."""
    host = environment.get("INFMOE_HOST", "")
    host = EVERYWHERE.get(host, host)
    port = environment.get("INFMOE_PORT", "") or "8000"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def check_health(url: str, patience_s: float = PATIENCE_S) -> str:
    """One line about a server that is well. Raises Unhealthy."""
    facts = ask(url, "/health/ready")
    if facts.get("status") == "ready":
        return "ready"
    if facts.get("status") not in ("starting", "loading"):
        raise Unhealthy(f"the server is {facts.get('status', 'no InfMoE server')}")
    facts = ask(url, "/health/startup")
    idle_s = float(str(facts.get("idle_s", 0.0)))
    told = f"{facts.get('phase')}, {facts.get('read_bytes')} of {facts.get('total_bytes')} bytes"
    if idle_s > patience_s:
        raise Unhealthy(f"loading is stuck for {idle_s:.0f} s: {told}")
    return f"loading: {told}"


def ask(url: str, path: str) -> dict[str, object]:
    """The JSON object at a path, whatever its status. Raises Unhealthy if there is none."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = None
    if host is None or parts.scheme not in ("http", "https"):
        raise Unhealthy(f"{url!r} is no address of a server; write http://HOST:PORT")
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", parts.path.rstrip("/") + path)
        facts = json.loads(connection.getresponse().read(MAX_BYTES))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = str(error) or type(error).__name__
        raise Unhealthy(f"{url} does not answer: {reason}") from error
    finally:
        connection.close()
    if not isinstance(facts, dict):
        raise Unhealthy(f"{url} is no InfMoE server")
    return facts
