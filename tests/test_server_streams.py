"""Joined event streams: what is there already is known, and nothing that came is held back."""

import asyncio

import pytest

from engine.request import Failed, Piece, Request
from engine.ticket import Ticket
from server.streams import Merge

REQUEST = Request(request_id="r", encoder_ids=(1,))


class Given:
    """A stream of events that the test puts in; None ends it."""

    def __init__(self):
        self.queue = asyncio.Queue()
        self.is_closed = False

    def __aiter__(self):
        return self

    async def __anext__(self):
        event = await self.queue.get()
        if event is None:
            raise StopAsyncIteration
        return event

    async def aclose(self):
        self.is_closed = True


def test_what_came_meanwhile_comes_together_and_streams_are_closed():
    async def scenario():
        first, second = Given(), Given()
        for event in (Piece("a", (1,)), Piece("b", (2,)), None):
            first.queue.put_nowait(event)
        async with Merge([first, second]) as merge:
            batches = merge.batches()
            seen = [await anext(batches)]
            second.queue.put_nowait(Piece("c", (3,)))
            second.queue.put_nowait(None)
            seen += [batch async for batch in batches]
        return seen, first.is_closed and second.is_closed

    seen, is_closed = asyncio.run(asyncio.wait_for(scenario(), 10))
    texts = [[(index, event.text) for index, event in batch] for batch in seen]
    assert texts == [[(0, "a"), (0, "b")], [(1, "c")]]
    assert is_closed


def test_a_stream_that_speaks_is_heard_to_its_end():
    async def scenario():
        loop = asyncio.get_running_loop()
        ticket, other = Ticket(REQUEST, loop), Ticket(REQUEST, loop)
        ticket.take(Piece("a", (1,)))
        async with Merge([ticket, other]) as merge:
            batches = merge.batches()
            seen = [await anext(batches)]
            ticket.take(Piece("b", (2,)))
            ticket.take(Failed("broken"))
            other.take(Failed("broken too"))
            seen += [batch async for batch in batches]
        return seen, ticket.is_cancelled() and other.is_cancelled()

    seen, is_closed = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert seen == [
        [(0, Piece("a", (1,)))],
        [(0, Piece("b", (2,))), (0, Failed("broken")), (1, Failed("broken too"))],
    ]
    assert is_closed


def test_what_a_stream_raises_comes_after_what_it_said():
    class Broken(Given):
        async def __anext__(self):
            if self.queue.empty():
                raise RuntimeError("broken")
            return await super().__anext__()

    async def scenario():
        broken = Broken()
        broken.queue.put_nowait(Piece("a", (1,)))
        async with Merge([broken, Given()]) as merge:
            batches = merge.batches()
            seen = await anext(batches)
            with pytest.raises(RuntimeError, match="broken"):
                await anext(batches)
        return seen

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) == [(0, Piece("a", (1,)))]


def test_a_silence_is_told_again_and_again():
    async def scenario():
        silent = Given()
        async with Merge([silent]) as merge:
            batches = merge.batches(0.01)
            seen = [await anext(batches), await anext(batches)]
            silent.queue.put_nowait(Piece("a", (1,)))
            while not (batch := await anext(batches)):
                pass
            return seen, batch

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) == ([[], []], [(0, Piece("a", (1,)))])
