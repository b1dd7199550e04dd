"""Joined event streams: what is there already is known, and nothing that came is held back."""

import asyncio

from engine.request import Piece
from server.streams import Merge


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


def test_what_waits_is_known_and_an_end_is_nothing_that_waits():
    async def scenario():
        first, second = Given(), Given()
        for event in (Piece("a", (1,)), Piece("b", (2,)), None):
            first.queue.put_nowait(event)
        async with Merge([first, second]) as merge:
            events = merge.events()
            seen = []
            for _ in range(2):
                seen.append((await anext(events), merge.has_waiting()))
            second.queue.put_nowait(Piece("c", (3,)))
            second.queue.put_nowait(None)
            seen.append((await anext(events), merge.has_waiting()))
            assert [event async for event in events] == []
        return seen, first.is_closed and second.is_closed

    seen, is_closed = asyncio.run(asyncio.wait_for(scenario(), 10))
    assert [(index, event.text) for (index, event), _ in seen] == [(0, "a"), (0, "b"), (1, "c")]
    assert [waits for _, waits in seen] == [True, False, False]
    assert is_closed


def test_a_silence_is_told():
    async def scenario():
        silent = Given()
        async with Merge([silent]) as merge:
            return await anext(merge.events(0.01))

    assert asyncio.run(asyncio.wait_for(scenario(), 10)) is None
