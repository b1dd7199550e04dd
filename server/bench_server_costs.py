"""What requests cost: seconds of the processor, by who took them, and how full the batch was."""

import re
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, Self

from server.bench_client import Client
from server.bench_server_rounds import Ask, Lane, run_sustained
from server.protocol import Engine

NUMBER = re.compile(r"^(\w+) (\S+)$", re.MULTILINE)


class Costs(NamedTuple):
    """Seconds of the processor; steps of the decoder's batch, and the rows of all of them."""

    client_s: float = 0.0
    gateway_s: float = 0.0
    engine_s: float = 0.0
    steps: float = 0.0
    rows: float = 0.0

    def plus(self, before: Self, after: Self) -> "Costs":
        """With what came between two readings."""
        return Costs(*(s + b - a for s, a, b in zip(self, before, after, strict=True)))

    def tell(self, num_requests: int) -> dict[str, float]:
        """Milliseconds of each for a request, and the mean batch."""
        times_s = {"client": self.client_s, "gateway": self.gateway_s, "engine": self.engine_s}
        told = {name: round(1000 * time_s / num_requests, 2) for name, time_s in times_s.items()}
        return {**told, "rows_per_step": round(self.rows / max(self.steps, 1), 1)}


Read = Callable[[], Awaitable[Costs]]


def read_engine(engine: Engine) -> Read:
    """Read the costs of asking an engine in this process: this thread is the client."""

    async def read() -> Costs:
        client_s = time.thread_time()
        work = engine.stats().work
        return Costs(client_s, 0.0, time.process_time() - client_s, work.steps, work.rows)

    return read


def read_server(client: Client) -> Read:
    """Read the costs of asking a server, which counts its own; to read them costs it 2 ms."""

    async def read() -> Costs:
        text = (await client.read("/metrics")).decode()
        numbers = {name: float(number) for name, number in NUMBER.findall(text)}
        return Costs(
            time.thread_time(),
            numbers.get("infmoe_process_cpu_seconds_total", 0.0),  # of Linux only
            numbers.get("infmoe_engine_process_cpu_seconds_total", 0.0),
            numbers["infmoe_decode_steps_total"],
            numbers["infmoe_decode_rows_total"],
        )

    return read


async def run_costed(asks: Sequence[Ask], tokens: int, lane: Lane, read: Read) -> Costs:
    """A sustained round; returns what it cost."""
    before = await read()
    await run_sustained(asks, tokens, lane)
    return Costs().plus(before, await read())
