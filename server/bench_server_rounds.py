"""Ways of asking for the same, the engine or a server, and rounds of so many requests at once."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from statistics import median
from time import perf_counter
from typing import Any

from engine.errors import EngineError
from engine.prompt import build_request
from engine.request import Failed, Piece, SamplingParams
from server.bench_client import Client, Trial
from server.protocol import Engine

STREAMS = (1, 16, 64)
LEAST_IN_TURN = 6  # requests of each stream: with few, what is measured is how a round ends
LEAST_IN_ALL = 16


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


def ask_server(client: Client, work: Work, *, stream: bool) -> Ask:
    """Ask the same of a server."""
    return lambda tokens: client.complete(work.body(tokens, stream=stream))


async def run_round(asks: Sequence[Ask], tokens: int, lane: Lane) -> None:
    """A request of each stream, all at once. Raises EngineError if one fails."""
    await _run([_ask_in_turn(ask, [tokens]) for ask in asks], lane)


async def run_sustained(asks: Sequence[Ask], tokens: int, lane: Lane) -> None:
    """Requests of each stream one after another, of so many tokens on average.

    Their lengths differ, the same for each way of asking, so that streams end and begin at all
    times, as those of people do. Raises EngineError if one fails.
    """
    num_requests = max(LEAST_IN_TURN, LEAST_IN_ALL // len(asks))
    work = []
    for stream, ask in enumerate(asks):
        draw = random.Random(stream)
        work.append(_ask_in_turn(ask, [draw.randint(1, 2 * tokens) for _ in range(num_requests)]))
    await _run(work, lane)


async def _ask_in_turn(ask: Ask, lengths: Sequence[int]) -> list[Trial]:
    return [await ask(tokens) for tokens in lengths]


async def _run(work: Sequence[Coroutine[Any, Any, list[Trial]]], lane: Lane) -> None:
    began = perf_counter()
    told = await asyncio.gather(*work)
    whole_s = perf_counter() - began
    trials = [trial for one in told for trial in one]
    if failed := [trial.error for trial in trials if trial.error]:
        raise EngineError(f"{len(failed)} of {len(trials)} requests failed: {failed[0]}")
    lane.trials += trials
    lane.tokens_per_s.append(sum(len(trial.token_s) for trial in trials) / whole_s)
