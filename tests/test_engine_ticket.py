"""Events on their way from the engine's thread to who reads or listens: all of them, once."""

import asyncio
import threading

from engine.request import Failed, Piece, Request
from engine.ticket import Ticket, put_all

REQUEST = Request(request_id="r", encoder_ids=(1,))
END = Failed("broken")


def pieces(num):
    return [Piece("a", (index,)) for index in range(num)]


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario(), 300))


def test_who_listens_hears_what_came_before_and_nothing_after_the_end():
    async def scenario():
        ticket = Ticket(REQUEST, asyncio.get_running_loop())
        heard = []
        for event in pieces(2):
            ticket.take(event)
        ticket.listen(heard.append)
        for event in (pieces(3)[2], END, Piece("late", (9,)), END):
            ticket.take(event)
        return heard

    assert run(scenario) == [*pieces(3), END]


def test_an_end_that_came_before_anybody_listened_is_the_last_that_is_heard():
    async def scenario():
        ticket = Ticket(REQUEST, asyncio.get_running_loop())
        heard = []
        for event in (*pieces(1), END, END):
            ticket.take(event)
        ticket.listen(heard.append)
        return heard

    assert run(scenario) == [*pieces(1), END]


def test_another_listener_takes_the_place_of_the_first():
    async def scenario():
        ticket = Ticket(REQUEST, asyncio.get_running_loop())
        first, second = [], []
        ticket.listen(first.append)
        ticket.take(pieces(1)[0])
        ticket.listen(second.append)
        ticket.take(END)
        return first, second

    assert run(scenario) == (pieces(1), [END])


def test_nothing_is_heard_of_a_ticket_that_is_closed():
    async def scenario():
        ticket = Ticket(REQUEST, asyncio.get_running_loop())
        heard = []
        ticket.listen(heard.append)
        await ticket.aclose()
        ticket.take(END)
        return heard, ticket.is_cancelled(), [event async for event in ticket]

    assert run(scenario) == ([], True, [])


def test_what_comes_after_it_was_closed_is_counted_and_what_was_told_is_not():
    async def scenario():
        tickets = [Ticket(REQUEST, asyncio.get_running_loop()) for _ in range(2)]
        heard, late = [], []
        for ticket in tickets:
            ticket.listen(heard.append)
            ticket.take(pieces(1)[0])
        tickets[1].take(END)
        for ticket in tickets:
            assert ticket.is_closed == (ticket is tickets[1])
            ticket.count_late(late.append)
            await ticket.aclose()
            assert ticket.is_closed
        tickets[0].take(pieces(2)[1])
        tickets[0].take(END)
        return heard, late

    assert run(scenario) == ([*pieces(1), *pieces(1), END], [pieces(2)[1], END])


def test_who_waits_is_told_that_it_is_closed():
    async def scenario():
        ticket = Ticket(REQUEST, asyncio.get_running_loop())
        waiting = asyncio.ensure_future(anext(ticket, None))
        await asyncio.sleep(0)
        await ticket.aclose()
        return await waiting

    assert run(scenario) is None


def test_a_wait_that_was_given_up_loses_no_event():
    async def scenario():
        ticket = Ticket(REQUEST, asyncio.get_running_loop())
        waiting = asyncio.ensure_future(anext(ticket))
        await asyncio.sleep(0)
        waiting.cancel()
        for event in (*pieces(1), END):  # while the wait is on its way out
            ticket.take(event)
        await asyncio.gather(waiting, return_exceptions=True)
        return [event async for event in ticket]

    assert run(scenario) == [*pieces(1), END]


def test_no_event_of_another_thread_is_lost_or_told_twice():
    """Half of the tickets are listened to when the first events are on their way, half are read."""
    num_tickets, num_events = 8, 200

    async def scenario():
        loop = asyncio.get_running_loop()
        tickets = [Ticket(REQUEST, loop) for _ in range(num_tickets)]
        heard = [[] for _ in tickets]

        def speak():
            for event in (*pieces(num_events), END):
                put_all([(ticket, event) for ticket in tickets])

        async def read(ticket, told):
            async for event in ticket:
                told.append(event)

        thread = threading.Thread(target=speak)
        thread.start()
        for ticket, told in zip(tickets[::2], heard[::2], strict=True):
            await asyncio.sleep(0)
            ticket.listen(told.append)
        readers = zip(tickets[1::2], heard[1::2], strict=True)
        await asyncio.gather(*(read(ticket, told) for ticket, told in readers))
        thread.join()
        return heard

    assert run(scenario) == [[*pieces(num_events), END]] * num_tickets
