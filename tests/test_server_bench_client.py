"""The client that measures: it counts tokens, however they come."""

import asyncio
from contextlib import aclosing

import pytest

from engine.request import Failed, Piece
from server.bench_client import Client, Target, complete
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


@pytest.mark.parametrize(("is_kept", "num_connections"), [(True, 2), (False, 5)])
def test_a_connection_is_kept_until_the_server_hangs_up(is_kept, num_connections):
    connections = []

    async def answer(reader, writer):
        connections.append(writer)
        for _ in range(3):
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\na\nb")
            if not is_kept:
                break
        writer.close()

    async def ask():
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            target = Target("127.0.0.1", server.sockets[0].getsockname()[1])
            async with aclosing(Client(target, is_kept=is_kept)) as client:
                told = []
                for _ in range(5):
                    told.append(await client.read("/"))
                    if len(told) == 3:
                        await connections[-1].wait_closed()
                        await wait_gone(client)
        return told

    async def wait_gone(client):
        while client._streams is not None and not client._streams[0].at_eof():  # noqa: ASYNC110  sets no event
            await asyncio.sleep(0.01)

    assert asyncio.run(ask()) == [b"a\nb"] * 5
    assert len(connections) == num_connections


@pytest.mark.parametrize("is_stream", [False, True])
def test_one_connection_asks_again_and_again(is_stream):
    engine = FakeEngine(lambda request: [*PIECES, finished(request, num_tokens=4)])

    async def ask(address):
        async with aclosing(Client(Target.parse(address))) as client:
            trials = [await client.complete({"prompt": "a", "stream": is_stream}) for _ in range(3)]
            assert b"infmoe_requests" in await client.read("/metrics")
        return trials

    with live_server(engine) as address:
        trials = asyncio.run(ask(address))
    assert [(trial.error, len(trial.token_s)) for trial in trials] == [("", 4)] * 3
