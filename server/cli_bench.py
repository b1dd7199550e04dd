"""The command `infmoe bench-server`."""

from pathlib import Path
from typing import Annotated

import typer


def bench_server(
    model: Annotated[Path, typer.Argument(help="Model directory.")],
    url: Annotated[
        str | None,
        typer.Option(help="Only load a server that runs already: http://127.0.0.1:8000."),
    ] = None,
    api_key: Annotated[
        str, typer.Option(help="Its key.", envvar="INFMOE_API_KEY", show_envvar=False)
    ] = "",
    streams: Annotated[
        list[int] | None, typer.Option(min=1, help="Requests at once; may repeat.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each way of asking.")] = 5,
    load_s: Annotated[float, typer.Option(min=0.1, help="Seconds of load.")] = 10.0,
    load_rate: Annotated[float, typer.Option(min=0.1, help="Requests per second.")] = 8.0,
) -> None:
    """Tell what the gateway adds to each request and token, and how it bears a load."""
    import asyncio

    from server.bench_client import Target
    from server.bench_server import compare, print_report, run_load, server_of, wait_loaded
    from server.bench_server_rounds import STREAMS, Work
    from server.cli import open_engine
    from server.settings_sources import read_settings

    work = Work(
        tokens=tokens,
        rounds=rounds,
        streams=tuple(streams or STREAMS),
        load_s=load_s,
        load_rate=load_rate,
    )
    if url is not None:
        print_report([], asyncio.run(run_load(Target.parse(url, api_key), work)))
        return
    max_rows = max(work.streams)
    engine = open_engine(model, read_settings(max_rows=max_rows))
    wait_loaded(engine)
    with server_of(model, max_rows) as target:
        rows = asyncio.run(compare(engine, target, work))
        load = asyncio.run(run_load(target, work))
    engine.drain(10.0)
    print_report(rows, load)
