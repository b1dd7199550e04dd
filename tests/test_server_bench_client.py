"""The client that measures: it counts tokens, however they come."""

import asyncio

import pytest

from engine.request import Failed, Piece
from server.bench_client import Target, complete
from tests.fakes import FakeEngine, finished, live_server

PIECES = [Piece("a", (1,)), Piece("", (2,)), Piece("bc", (3, 4)), Piece("d", ())]


@pytest.mark.parametrize("is_stream", [False, True])
def test_tokens_are_counted_and_not_events(is_stream):
    engine = FakeEngine(lambda request: [*PIECES, finished(request, num_tokens=4)])
    with live_server(engine) as address:
        body = {"prompt": "a", "stream": is_stream}
        trial = asyncio.run(complete(Target.parse(address), body))
    assert trial.error == ""
    assert len(trial.token_s) == 4
    assert trial.token_s == sorted(trial.token_s)
    assert trial.end_s >= trial.token_s[-1]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_failure_is_told(is_stream):
    engine = FakeEngine(lambda _: [PIECES[0], Failed("broken")])
    with live_server(engine) as address:
        body = {"prompt": "a", "stream": is_stream}
        trial = asyncio.run(complete(Target.parse(address), body))
    assert trial.error == ("engine_failure" if is_stream else "status 500")
