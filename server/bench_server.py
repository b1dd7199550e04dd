"""`infmoe bench-server`: what the gateway costs over calling the engine, and how it bears a load.

The same model is loaded twice: in this process, where requests go to the engine directly, and in a
server process of its own. Rounds of both take turns, so that a noisy machine troubles both alike.
Of a sustained round, in which streams end and begin at all times, the costs are told as well.
"""

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter, sleep

import typer

from engine.errors import EngineError
from server.bench_client import Client, Target, Trial, complete
from server.bench_server_costs import Costs, read_engine, read_server, run_costed
from server.bench_server_rounds import LEAST_IN_ALL, Lane, Work, ask_engine, ask_server, run_round
from server.protocol import Engine

READY_S = 600.0
GREETING = re.compile(r"listening on (http://\S+);")
EMPTY = "/health/live"
NUM_EMPTY = 100


async def compare(engine: Engine, target: Target, work: Work) -> list[dict[str, object]]:
    """One row of numbers for each number of streams."""
    rows = []
    for streams in work.streams:
        async with contextlib.AsyncExitStack() as stack:
            clients = [Client(target) for _ in range(streams)]
            for client in clients:
                stack.push_async_callback(client.aclose)
            rows.append(await _compare_at(engine, clients, work))
    return rows


async def _compare_at(engine: Engine, clients: list[Client], work: Work) -> dict[str, object]:
    lanes = {
        "direct": [ask_engine(engine, work)] * len(clients),
        "streamed": [ask_server(client, work, stream=True) for client in clients],
        "whole": [ask_server(client, work, stream=False) for client in clients],
    }
    reads = {"direct": read_engine(engine), "streamed": read_server(clients[0])}
    for asks in lanes.values():  # to warm up
        await run_round(asks, work.tokens, Lane())
    burst, single, sustained = ({name: Lane() for name in lanes} for _ in range(3))
    costs = dict.fromkeys(reads, Costs())
    for turn in range(work.rounds):
        for name in _turned(list(lanes), turn):
            await run_round(lanes[name], work.tokens, burst[name])
            for _ in range(max(1, LEAST_IN_ALL // len(clients))):
                await run_round(lanes[name], 1, single[name])
        for name in _turned(list(reads), turn):
            spent = await run_costed(lanes[name], work.tokens, sustained[name], reads[name])
            costs[name] = costs[name].plus(Costs(), spent)
    told = {name: cost.tell(len(sustained[name].trials)) for name, cost in costs.items()}
    return {
        **_compare_lanes(len(clients), burst, single),
        "sustained": _compare_rates({name: sustained[name] for name in reads}),
        "cpu_ms_per_request": told,
        "empty_request_ms": await time_empty(clients[0]),
    }


def _turned(names: list[str], turn: int) -> list[str]:
    """Each comes first in its turn: who follows whom should make no difference."""
    first = turn % len(names)
    return names[first:] + names[:first]


async def time_empty(client: Client) -> float:
    """Milliseconds, at the median, that a request takes which asks for nothing."""
    times_s = []
    for _ in range(NUM_EMPTY):
        began = perf_counter()
        await client.read(EMPTY)
        times_s.append(perf_counter() - began)
    return round(1000 * median(times_s), 3)


def _compare_rates(lanes: dict[str, Lane]) -> dict[str, object]:
    rates = {name: round(median(lane.tokens_per_s), 1) for name, lane in lanes.items()}
    ratio = round(rates["streamed"] / rates["direct"], 3)
    return {"tokens_per_s": rates, "throughput_ratio": ratio}


def _compare_lanes(
    streams: int, seen: dict[str, Lane], single: dict[str, Lane]
) -> dict[str, object]:
    def added(lanes: dict[str, Lane], name: str, measure: Callable[[Trial], float]) -> float:
        return round(lanes[name].median_ms(measure) - lanes["direct"].median_ms(measure), 3)

    return {
        "streams": streams,
        "added_ms_per_request": added(single, "whole", lambda trial: trial.end_s),
        "added_ms_to_first_token": added(single, "streamed", lambda trial: trial.first_s),
        "added_ms_per_streamed_token": added(seen, "streamed", lambda trial: trial.between_s),
        **_compare_rates(seen),
    }


async def run_load(target: Target, work: Work, seed: int = 0) -> dict[str, object]:
    """Requests at random times (Poisson), whether earlier ones have ended or not."""
    draw = random.Random(seed)
    tasks, began = [], perf_counter()
    due = draw.expovariate(work.load_rate)
    while due < work.load_s:
        await asyncio.sleep(max(began + due - perf_counter(), 0))
        tokens = draw.randint(1, 2 * work.tokens)
        tasks.append(asyncio.create_task(complete(target, work.body(tokens, stream=True))))
        due += draw.expovariate(work.load_rate)
    trials = await asyncio.gather(*tasks)
    whole_s = perf_counter() - began
    good = [trial for trial in trials if not trial.error]
    return {
        "asked": len(trials),
        "answered": len(good),
        "errors": dict(Counter(trial.error for trial in trials if trial.error)),
        "requests_per_s": round(len(good) / whole_s, 2),
        "tokens_per_s": round(sum(len(trial.token_s) for trial in good) / whole_s, 1),
        "first_token_ms": percentiles([trial.first_s for trial in good]),
        "between_tokens_ms": percentiles([t.between_s for t in good if len(t.token_s) > 1]),
        "whole_ms": percentiles([trial.end_s for trial in good]),
    }


def percentiles(times_s: Sequence[float]) -> dict[str, float]:
    """Of times in seconds, in milliseconds: p50, p95, p99; nothing of fewer than two."""
    if len(times_s) < 2:
        return {}
    cuts = quantiles(times_s, n=100, method="inclusive")
    return {f"p{p}": round(1000 * cuts[p - 1], 1) for p in (50, 95, 99)}


@contextlib.contextmanager
def server_of(model: Path, max_rows: int) -> Iterator[Target]:
    """A server process for a model, ready to answer. Raises EngineError if it ends before that."""
    command = [sys.executable, "-m", "server", "serve", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, "--max-rows", str(max_rows), "--log-level", "error"],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        for line in process.stderr:
            if found := GREETING.search(line):
                url = found[1]
                break
        else:
            raise EngineError("the server did not start")
        wait_ready(url, process)
        yield Target.parse(url)
    finally:
        process.terminate()
        process.communicate()


def wait_loaded(engine: Engine) -> None:
    """Wait until an engine takes requests. Raises EngineError if it fails."""
    while engine.state in ("starting", "loading"):
        sleep(0.02)
    if engine.state != "ready":
        raise EngineError(f"the model cannot be loaded: {engine.failure}")


def wait_ready(url: str, process: "subprocess.Popen[str]") -> None:
    """Wait until a server takes requests. Raises EngineError if it ends, or takes too long."""
    until = monotonic() + READY_S
    while monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"{url}/health/ready", timeout=10).close()
            return
        sleep(0.05)
    raise EngineError(f"{url} did not get ready")


def print_report(rows: Sequence[dict[str, object]], load: dict[str, object]) -> None:
    """Tables for people, then one line of JSON for programs."""
    typer.echo("added by the gateway, medians; tokens/s of the engine alone -> served (ratio)")
    typer.echo(
        "streams  ms/request  ms to first  ms/streamed token  "
        f"{'all at once':>26}  {'sustained, lengths differ':>26}"
    )
    for row in rows:
        sustained = row["sustained"]
        assert isinstance(sustained, dict)
        typer.echo(
            f"{row['streams']:>7}  {row['added_ms_per_request']:>10}  "
            f"{row['added_ms_to_first_token']:>11}  {row['added_ms_per_streamed_token']:>17}  "
            f"{_tell_rates(row):>26}  {_tell_rates(sustained):>26}"
        )
    for row in rows:
        typer.echo(
            f"{row['streams']} streams, processor ms/request when sustained: "
            f"{row['cpu_ms_per_request']}; a request for nothing takes {row['empty_request_ms']} ms"
        )
    typer.echo("under load: " + ", ".join(f"{name} {value}" for name, value in load.items()))
    typer.echo(json.dumps({"bench": "server", "overhead": rows, "load": load}))


def _tell_rates(row: dict[str, object]) -> str:
    rates = row["tokens_per_s"]
    assert isinstance(rates, dict)
    return f"{rates['direct']} -> {rates['streamed']} ({row['throughput_ratio']})"
