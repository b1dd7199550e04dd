"""`infmoe bench-server`: what the gateway costs over calling the engine, and how it bears a load.

The same model is loaded twice: in this process, where requests go to the engine directly, and in a
server process of its own. Rounds of both take turns, so that a noisy machine troubles both alike.
"""

import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles
from time import monotonic, perf_counter, sleep

import typer

from engine.errors import EngineError
from engine.prompt import build_request
from engine.request import Failed, Piece, SamplingParams
from server.bench_client import Target, Trial, complete
from server.protocol import Engine

STREAMS = (1, 16, 64)
READY_S = 600.0
GREETING = re.compile(r"listening on (http://\S+);")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What each request asks for, and how long to measure. Times in seconds, rate per second."""

    prompt: str = "The quick brown fox jumps over the lazy dog and"
    tokens: int = 32
    rounds: int = 5
    streams: tuple[int, ...] = STREAMS
    load_s: float = 10.0
    load_rate: float = 8.0

    def params(self, tokens: int) -> SamplingParams:
        """How the engine is asked directly."""
        return SamplingParams(max_tokens=tokens, ignore_eos=True)

    def body(self, tokens: int, *, stream: bool) -> dict[str, object]:
        """How the server is asked for the same."""
        return {
            "prompt": self.prompt,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
        }


@dataclass(slots=True)
class Lane:
    """What was seen of one way of asking, at one number of streams."""

    trials: list[Trial] = field(default_factory=list)
    tokens_per_s: list[float] = field(default_factory=list)

    def median_ms(self, measure: Callable[[Trial], float]) -> float:
        """Median over requests, in milliseconds."""
        return 1000 * median(measure(trial) for trial in self.trials)


Ask = Callable[[int], Awaitable[Trial]]


def ask_engine(engine: Engine, work: Work) -> Ask:
    """Ask the engine itself."""

    async def ask(tokens: int) -> Trial:
        trial, began = Trial(), perf_counter()
        request = build_request(
            work.prompt, engine.tokenizer, engine.config, work.params(tokens), "bench"
        )
        async for event in engine.submit(request):
            if isinstance(event, Failed):
                trial.error = event.message
            elif isinstance(event, Piece):
                trial.token_s += [perf_counter() - began] * len(event.token_ids)
        trial.end_s = perf_counter() - began
        return trial

    return ask


def ask_server(target: Target, work: Work, *, stream: bool) -> Ask:
    """Ask the same of a server."""
    return lambda tokens: complete(target, work.body(tokens, stream=stream))


async def run_round(ask: Ask, streams: int, tokens: int, lane: Lane) -> None:
    """So many requests at once. Raises EngineError if one fails."""
    began = perf_counter()
    trials = await asyncio.gather(*(ask(tokens) for _ in range(streams)))
    whole_s = perf_counter() - began
    if failed := [trial.error for trial in trials if trial.error]:
        raise EngineError(f"{len(failed)} of {streams} requests failed: {failed[0]}")
    lane.trials += trials
    lane.tokens_per_s.append(sum(len(trial.token_s) for trial in trials) / whole_s)


async def compare(engine: Engine, target: Target, work: Work) -> list[dict[str, object]]:
    """One row of numbers for each number of streams."""
    rows = []
    lanes = {
        "direct": ask_engine(engine, work),
        "streamed": ask_server(target, work, stream=True),
        "whole": ask_server(target, work, stream=False),
    }
    for streams in work.streams:
        for ask in lanes.values():  # to warm up
            await run_round(ask, streams, work.tokens, Lane())
        seen = {name: Lane() for name in lanes}
        single = {name: Lane() for name in lanes}
        for _ in range(work.rounds):
            for name, ask in lanes.items():
                await run_round(ask, streams, work.tokens, seen[name])
                await run_round(ask, streams, 1, single[name])
        rows.append(_compare_lanes(streams, seen, single))
    return rows


def _compare_lanes(
    streams: int, seen: dict[str, Lane], single: dict[str, Lane]
) -> dict[str, object]:
    def added(lanes: dict[str, Lane], name: str, measure: Callable[[Trial], float]) -> float:
        return round(lanes[name].median_ms(measure) - lanes["direct"].median_ms(measure), 3)

    rates = {name: round(median(lane.tokens_per_s), 1) for name, lane in seen.items()}
    return {
        "streams": streams,
        "added_ms_per_request": added(single, "whole", lambda trial: trial.end_s),
        "added_ms_to_first_token": added(single, "streamed", lambda trial: trial.first_s),
        "added_ms_per_streamed_token": added(seen, "streamed", lambda trial: trial.between_s),
        "tokens_per_s": rates,
        "throughput_ratio": round(rates["streamed"] / rates["direct"], 3),
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
        with contextlib.suppress(urllib.error.URLError):
            urllib.request.urlopen(f"{url}/health/ready", timeout=10).close()
            return
        sleep(0.05)
    raise EngineError(f"{url} did not get ready")


def print_report(rows: Sequence[dict[str, object]], load: dict[str, object]) -> None:
    """Tables for people, then one line of JSON for programs."""
    head = "streams  ms/request  ms to first  ms/streamed token  tokens/s direct -> served (ratio)"
    typer.echo(f"added by the gateway, medians\n{head}")
    for row in rows:
        rates = row["tokens_per_s"]
        assert isinstance(rates, dict)
        typer.echo(
            f"{row['streams']:>7}  {row['added_ms_per_request']:>10}  "
            f"{row['added_ms_to_first_token']:>11}  {row['added_ms_per_streamed_token']:>17}  "
            f"{rates['direct']:>8} -> {rates['streamed']} ({row['throughput_ratio']})"
        )
    typer.echo("under load: " + ", ".join(f"{name} {value}" for name, value in load.items()))
    typer.echo(json.dumps({"bench": "server", "overhead": rows, "load": load}))
