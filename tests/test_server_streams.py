"""Joined event streams: what is there already is known, and nothing that came is held back."""

import asyncio

import pytest
from starlette.requests import ClientDisconnect

from engine.request import Failed, Piece, Request
from engine.ticket import Ticket
from server.streams import Merge, until_disconnect

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

    seen, is_closed = asyncio.run(asyncio.wait_for(scenario(), 300))
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

    seen, is_closed = asyncio.run(asyncio.wait_for(scenario(), 300))
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

    assert asyncio.run(asyncio.wait_for(scenario(), 300)) == [(0, Piece("a", (1,)))]


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

    assert asyncio.run(asyncio.wait_for(scenario(), 300)) == ([[], []], [(0, Piece("a", (1,)))])


def test_a_reader_that_was_slow_gets_one_sign_of_life_and_not_all_that_it_missed():
    async def scenario():
        async with Merge([Given()]) as merge:
            batches = merge.batches(0.2)
            seen = [await anext(batches)]
            await asyncio.sleep(1.0)
            loop = asyncio.get_running_loop()
            began_s = loop.time()
            seen += [await anext(batches), await anext(batches)]
            return seen, loop.time() - began_s

    seen, took_s = asyncio.run(asyncio.wait_for(scenario(), 300))
    assert seen == [[], [], []]
    assert took_s >= 0.19  # timers are early by less than a millisecond


@pytest.mark.parametrize("has_tickets", [False, True])
def test_what_nobody_reads_is_counted_too_and_once(has_tickets):
    events = [Piece("a", (1,)), Piece("b", (2,)), Failed("broken")]

    async def scenario():
        counted = []
        stream = Ticket(REQUEST, asyncio.get_running_loop()) if has_tickets else Given()
        merge = Merge([stream])
        merge.count_by(lambda index, event: counted.append((index, event)))
        give = stream.take if has_tickets else stream.queue.put_nowait
        async with merge:
            give(events[0])
            read = await anext(merge.batches())
            for event in events[1:]:
                give(event)
            for _ in range(10):  # of which a stream that is pumped needs some
                await asyncio.sleep(0)
        return read, counted

    read, counted = asyncio.run(asyncio.wait_for(scenario(), 300))
    assert read == [(0, events[0])]
    assert counted == [(0, event) for event in events]


def test_what_tickets_make_after_the_end_is_counted():
    event = Piece("a", (1,))

    async def scenario():
        counted = []
        tickets = [Ticket(REQUEST, asyncio.get_running_loop()) for _ in range(2)]
        merge = Merge(tickets)
        merge.count_by(lambda index, event: counted.append((index, event)))
        async with merge:
            pass
        for ticket in tickets:
            ticket.take(event)
        return counted

    assert asyncio.run(asyncio.wait_for(scenario(), 300)) == [(0, event), (1, event)]


class Client:
    """Whose requests a test awaits: it goes when it is told to."""

    def __init__(self):
        self.gone = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def never(began):
    began.set()
    await asyncio.Event().wait()


def test_work_ends_with_the_client_and_the_task_goes_on():
    async def scenario():
        client, began = Client(), asyncio.Event()
        began_task = asyncio.create_task(began.wait())
        began_task.add_done_callback(lambda _: client.gone.set())
        with pytest.raises(ClientDisconnect):
            await until_disconnect(client.receive, never(began))
        await asyncio.sleep(0)  # where a cancellation that was left would come up
        return asyncio.current_task().cancelling()

    assert asyncio.run(asyncio.wait_for(scenario(), 300)) == 0


@pytest.mark.parametrize("is_gone", [False, True])
def test_who_cancels_the_task_is_not_taken_for_the_client(is_gone):
    async def scenario():
        client, began = Client(), asyncio.Event()
        task = asyncio.create_task(until_disconnect(client.receive, never(began)))
        await began.wait()
        if is_gone:
            client.gone.set()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelled()

    assert asyncio.run(asyncio.wait_for(scenario(), 300))


def test_a_client_that_goes_is_known_in_a_task_that_was_cancelled_before():
    """As in clean-up after a cancellation, which goes on with the count of it."""

    async def clean_up():
        client, began = Client(), asyncio.Event()
        with pytest.raises(asyncio.CancelledError):
            await asyncio.Event().wait()
        began_task = asyncio.create_task(began.wait())
        began_task.add_done_callback(lambda _: client.gone.set())
        with pytest.raises(ClientDisconnect):
            await until_disconnect(client.receive, never(began))
        return asyncio.current_task().cancelling()

    async def scenario():
        task = asyncio.create_task(clean_up())
        await asyncio.sleep(0)
        task.cancel()
        return await task

    assert asyncio.run(asyncio.wait_for(scenario(), 300)) == 1


def test_work_that_is_done_when_the_client_goes_is_the_result():
    async def scenario():
        client = Client()

        async def work():
            client.gone.set()
            return 7

        told = await until_disconnect(client.receive, work())
        for _ in range(3):  # the watch ends, and cancels nobody
            await asyncio.sleep(0)
        return told, asyncio.current_task().cancelling(), len(asyncio.all_tasks())

    assert asyncio.run(scenario()) == (7, 0, 1)
