"""What the benchmark counts of a round: each request once, costs by who took them."""

import asyncio
from contextlib import aclosing

import pytest

from engine.errors import EngineError
from engine.request import Failed, Piece
from server.bench_client import Client, Target, Trial
from server.bench_server import percentiles, time_empty
from server.bench_server_costs import Costs, read_server, run_costed
from server.bench_server_rounds import (
    LEAST_IN_ALL,
    LEAST_IN_TURN,
    Lane,
    Work,
    ask_engine,
    ask_server,
    run_round,
    run_sustained,
)
from tests.fakes import FakeEngine, finished, live_server


def noting(asked):
    """Ways of asking that note for how many tokens each stream asks."""

    def way(stream):
        async def ask(tokens):
            asked.setdefault(stream, []).append(tokens)
            return Trial(token_s=[0.0] * tokens)

        return ask

    return way


def test_a_round_asks_once_of_each_stream():
    asked, lane = {}, Lane()
    asyncio.run(run_round([noting(asked)(stream) for stream in range(3)], 5, lane))
    assert asked == {0: [5], 1: [5], 2: [5]}
    assert len(lane.trials) == 3
    assert len(lane.tokens_per_s) == 1


@pytest.mark.parametrize("streams", [1, 16])
def test_a_sustained_round_asks_each_way_for_the_same_lengths(streams):
    seen = []
    for _ in range(2):
        asked = {}
        asyncio.run(run_sustained([noting(asked)(s) for s in range(streams)], 8, Lane()))
        seen.append(asked)
    assert seen[0] == seen[1]
    lengths = [tokens for one in seen[0].values() for tokens in one]
    assert len(lengths) == streams * max(LEAST_IN_TURN, LEAST_IN_ALL // streams)
    assert set(lengths) <= set(range(1, 17))
    assert len(set(lengths)) > 4


def test_a_failure_ends_the_round():
    engine = FakeEngine(lambda _: [Failed("broken")])

    async def run():
        await run_round([ask_engine(engine, Work())], 5, Lane())

    with pytest.raises(EngineError, match="1 of 1 requests failed: broken"):
        asyncio.run(run())


def test_costs_are_those_between_two_readings():
    spent = Costs().plus(Costs(1, 2, 3, 4, 5), Costs(1.5, 2.25, 4, 14, 45))
    assert spent == Costs(0.5, 0.25, 1, 10, 40)
    told = {"client": 50.0, "gateway": 25.0, "engine": 100.0, "rows_per_step": 4.0}
    assert spent.tell(10) == told
    assert Costs().tell(1)["rows_per_step"] == 0


def test_a_server_tells_its_costs():
    pieces = [Piece("a", (1,))]
    engine = FakeEngine(lambda request: [*pieces, finished(request, num_tokens=1)])

    async def run(address):
        async with aclosing(Client(Target.parse(address))) as client:
            asks, lane = [ask_server(client, Work(), stream=True)], Lane()
            return await run_costed(asks, 4, lane, read_server(client)), await time_empty(client)

    with live_server(engine) as address:
        costs, empty_ms = asyncio.run(run(address))
    assert costs.client_s > 0
    assert costs.gateway_s >= 0  # in hundredths of a second
    assert costs.steps == 0  # a fake has no batch
    assert empty_ms > 0


def test_percentiles_are_in_milliseconds():
    assert percentiles([0.001 * n for n in range(101)]) == {"p50": 50.0, "p95": 95.0, "p99": 99.0}
    assert percentiles([1.0]) == {}
