"""An engine behind sockets does what one in this process does, whatever ends either of them."""

import asyncio
import gc
import logging
import os
import signal
import socket
import threading
from contextlib import closing
from dataclasses import replace
from unittest.mock import ANY

import pytest

from engine.adapters import Adapter, Slots
from engine.checkpoint import save_model
from engine.errors import EngineStopped, Overloaded, RequestError
from engine.grammar import compile_grammar
from engine.model.transformer import set_invariant
from engine.prompt import build_request
from engine.remote_messages import TakeBack, Turn, Unpacker, pack, pack_turn
from engine.remote_outbox import Outbox
from engine.remote_process import tell_status
from engine.remote_wire import make_wires
from engine.request import (
    BeamParams,
    Continuations,
    Failed,
    Finished,
    Piece,
    Pooling,
    SamplingParams,
    TokenLogprob,
)
from engine.worker import LoadedModel, Worker
from tests.adapter_folders import vectors
from tests.remote_engines import OPTIONS, hosted, load_tiny, spawned
from tests.tiny import MOE, byte_tokenizer, tiny_model
from tests.waiting import wait_for

TOKENIZER = byte_tokenizer()


def make(text="hello", task=None, adapter=None, fill=False, given=None, **params):
    request = build_request(
        text,
        TOKENIZER,
        MOE,
        SamplingParams(**params),
        "r",
        fill=fill,
        adapter=adapter,
        decoder_prompt=given,
    )
    return replace(request, task=task)


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, 300))


async def become(is_true):
    while not is_true():  # noqa: ASYNC110  other threads set no event
        await asyncio.sleep(0.01)


async def collect(stream):
    return [event async for event in stream]


async def collect_all(engine, requests):
    return await asyncio.gather(*[collect(engine.submit(request)) for request in requests])


def untimed(events):
    return [
        replace(event, queued_s=0.0, encode_s=0.0, decode_s=0.0)
        if isinstance(event, Finished)
        else event
        for event in events
    ]


def invariant_model():
    model = tiny_model()
    set_invariant(model)
    return LoadedModel(model, TOKENIZER)


def mixed_requests():
    adapter = Adapter(name="task", version="1", prompt_PD=vectors(3, 1), slots=Slots(front=3))
    grammar = compile_grammar("regex", "[a-c]{3,5}", TOKENIZER)
    long = {"max_tokens": 20, "ignore_eos": True}
    requests = [
        make("plain", **long),
        make("drawn", temperature=1.0, top_k=50, **long),
        make("told", logprobs=3, prompt_logprobs=2, given="ab", max_tokens=5),
        make("blanks <span> and <span>.", fill=True, max_tokens=12),
        make("stops", stop=("e", "a"), max_tokens=30, include_stop=True),
        make("soft", adapter=adapter, **long),
        make("soft too", adapter=adapter, temperature=0.7, **long),
        make("ruled", grammar=grammar, temperature=1.0, max_tokens=9),
        make("ruled and soft", grammar=grammar, adapter=adapter, max_tokens=9),
        make("scored", Continuations(choices=((5, 6), (7,)), top=2)),
        make("searched", BeamParams(num_beams=3), max_tokens=6),
        make("pooled", Pooling()),
    ]
    seeded = [replace(request.params, seed=number) for number, request in enumerate(requests)]
    return [replace(one, params=params) for one, params in zip(requests, seeded, strict=True)]


def test_all_kinds_of_requests_come_to_the_same_as_without_a_process_between():
    requests = mixed_requests()
    worker = Worker("tiny", lambda _: invariant_model())
    worker.start()
    try:
        wait_for(lambda: worker.state == "ready")
        expected = run(collect_all(worker, requests))
    finally:
        assert worker.drain(60)
    with hosted(lambda _: invariant_model()) as (engine, host):
        told = run(collect_all(engine, requests))
        assert engine.stats() == replace(worker.stats(), encoder_cache=ANY, work=ANY, stalled_s=ANY)
        assert not host._tickets
        assert not host._unbegun
    assert list(map(untimed, told)) == list(map(untimed, expected))
    assert all(isinstance(events[-1], Finished) for events in told)


def test_what_the_model_is_is_known_when_it_is_ready():
    with hosted() as (engine, host):
        assert engine.state == engine.phase == "ready"
        assert engine.config == host._worker.config
        assert engine.adapter_base == host._worker.adapter_base
        assert engine.tokenizer.encode("ab") == TOKENIZER.encode("ab")
        assert (engine.plan, engine.fallbacks, engine.failure) == (None, (), None)
        assert engine.is_alive


def refusal_of(work):
    with pytest.raises((RequestError, Overloaded, EngineStopped)) as caught:
        work()
    error = caught.value
    return type(error), str(error), getattr(error, "field", None)


def test_what_is_refused_is_refused_at_once_with_the_same_words():
    async def refusals(engine):
        bad = [Continuations(choices=()), Continuations(choices=((9999,),))]
        return [refusal_of(lambda task=task: engine.submit(make("x", task))) for task in bad]

    worker = Worker("tiny", load_tiny)
    before = [refusal_of(lambda: worker.require_room(1)), refusal_of(lambda: worker.config)]
    worker.start()
    wait_for(lambda: worker.state == "ready")
    expected = run(refusals(worker))
    worker.drain(60)
    gate = threading.Event()

    def load(report):
        gate.wait(300)
        return load_tiny(report)

    threading.Timer(0.5, gate.set).start()
    with hosted(load) as (engine, _):
        assert run(refusals(engine)) == expected
        engine.drain(60)
        kind, text, _ = refusal_of(lambda: engine.require_room(1))
        assert (kind, text) == (EngineStopped, "the engine is stopped; no request is accepted")
    assert before[0][0] is before[1][0] is EngineStopped


class Gate:
    """A loader of a model whose first decoder step waits to be let through."""

    def __init__(self):
        self.reached, self.opened = threading.Event(), threading.Event()

    def load(self, report):
        loaded = load_tiny(report)
        step = loaded.model.step

        def wait_and_step(*arguments):
            self.reached.set()
            self.opened.wait(300)
            return step(*arguments)

        loaded.model.step = wait_and_step
        return loaded


def test_the_queue_is_bounded_here_and_its_places_are_known_to_be_free():
    gate = Gate()

    async def scenario(engine):
        first = engine.submit(make("a", max_tokens=3, ignore_eos=True))
        await become(lambda: not list(engine._line.waiting()))  # it is known to have begun
        second = engine.submit(make("b", max_tokens=3))
        with pytest.raises(Overloaded, match="1 requests are waiting already") as caught:
            engine.submit(make("c", max_tokens=3))
        with pytest.raises(Overloaded):
            engine.require_room(1)
        assert caught.value.retry_after_s > 0
        gate.opened.set()
        return [(await collect(stream))[-1] for stream in (first, second)]

    with hosted(gate.load, replace(OPTIONS, max_queue=1)) as (engine, _):
        ends = run(scenario(engine))
        assert engine.stats().requests == 2
    assert all(isinstance(end, Finished) for end in ends)


def test_closed_requests_are_dropped_and_forgotten_on_both_sides():
    async def scenario(engine):
        long = {"max_tokens": 40, "ignore_eos": True}
        streams = [engine.submit(make(text, **long)) for text in "abcdef"]
        assert isinstance(await anext(streams[0]), Piece)
        for stream in streams[:-1]:
            await stream.aclose()
        assert (await collect(streams[-1]))[-1].completion_tokens == 40
        assert await collect(streams[0]) == []
        # the last of those that were closed are told at the turn after
        assert len(await collect(engine.submit(make("g", max_tokens=3, ignore_eos=True)))) >= 4
        return engine.stats()

    with hosted() as (engine, host):
        stats = run(scenario(engine))
        assert (stats.requests, stats.cancelled, stats.failed) == (2, 5, 0)
        assert not engine._line._tickets
        assert not host._tickets
        assert not host._unbegun
        assert not host._closing


def test_what_a_step_under_way_makes_for_a_closed_request_is_counted():
    gate, late = Gate(), []

    async def scenario(engine):
        stream = engine.submit(make("a", max_tokens=9, ignore_eos=True))
        await asyncio.to_thread(gate.reached.wait, 300)
        stream.count_late(late.append)
        await stream.aclose()
        gate.opened.set()
        other = engine.submit(make("b", max_tokens=2, ignore_eos=True))
        return await collect(other)

    with hosted(gate.load) as (engine, _):
        assert isinstance(run(scenario(engine))[-1], Finished)
    assert sum(len(event.token_ids) for event in late) <= 2
    assert all(isinstance(event, Piece) for event in late)


def test_a_grammar_that_nobody_waits_for_any_more_makes_no_request():
    grammar = compile_grammar("choice", ["yes", "no"], TOKENIZER)

    async def scenario(engine, host):
        host._compilers.submit(host_waits.wait, 300)
        stream = engine.submit(make("x", grammar=grammar))
        await become(lambda: host._tickets)
        await stream.aclose()
        await become(lambda: not host._tickets)
        host_waits.set()
        events = await collect(engine.submit(make("y", grammar=grammar)))
        return "".join(event.text for event in events if isinstance(event, Piece))

    host_waits = threading.Event()
    with hosted() as (engine, host):
        assert run(scenario(engine, host)) in ("yes", "no")
        assert engine.stats().requests == 1


def test_an_adapter_goes_over_once_and_is_let_go_when_nobody_here_has_it():
    def soft(version):
        prompt_PD = vectors(3, int(version))
        return Adapter(name="task", version=version, prompt_PD=prompt_PD, slots=Slots(front=3))

    async def scenario(engine, host):
        one, two = soft("1"), soft("2")
        for adapter in (one, two, one):
            await collect(engine.submit(make("x", adapter=adapter, max_tokens=2)))
        assert [adapter.version for adapter in host._adapters.values()] == ["1", "2"]
        assert list(host._adapters) == [0, 1]
        del one, adapter
        gc.collect()
        await collect(engine.submit(make("x", adapter=two, max_tokens=2)))
        assert [adapter.version for adapter in host._adapters.values()] == ["2"]

    with hosted() as (engine, host):
        run(scenario(engine, host))


def test_a_model_that_cannot_be_loaded_is_told_as_the_worker_tells_it():
    def load(_):
        raise RequestError("there is no such thing")

    with hosted(load) as (engine, _):
        assert (engine.state, engine.failure) == ("failed", "there is no such thing")
        with pytest.raises(EngineStopped, match="not loaded: there is no such thing"):
            _ = engine.config


def test_a_tokenizer_that_cannot_be_opened_here_fails_the_engine():
    config = replace(MOE, tokenizer="sentencepiece")
    with hosted(lambda _: LoadedModel(tiny_model(config), TOKENIZER)) as (engine, _):
        assert engine.state == "failed"
        assert "spiece.model" in engine.failure
        assert not engine.is_alive


def test_progress_of_loading_is_told():
    opened, workers = threading.Event(), []

    def load(report):
        report("reading weights")
        workers[0].progress.begin(1000)
        workers[0].progress.add(250)
        opened.wait(300)
        return load_tiny(report)

    with hosted(load, workers=workers, until=lambda one: one.progress.read_bytes) as (engine, _):
        assert (engine.state, engine.phase) == ("loading", "reading weights")
        assert (engine.progress.read_bytes, engine.progress.total_bytes) == (250, 1000)
        assert engine.stats().running == 0
        with pytest.raises(EngineStopped, match="not loaded: reading weights"):
            _ = engine.tokenizer
        opened.set()
        wait_for(lambda: engine.state == "ready")


def test_a_drain_finishes_what_was_accepted():
    async def scenario(engine):
        stream = engine.submit(make(max_tokens=30, ignore_eos=True))
        await anext(stream)
        is_done = await asyncio.to_thread(engine.drain, 60)
        return is_done, (await collect(stream))[-1]

    with hosted() as (engine, _):
        is_done, end = run(scenario(engine))
        assert is_done
        assert isinstance(end, Finished)
        assert (engine.state, engine.is_alive) == ("stopped", False)


def test_a_drain_out_of_time_ends_requests_with_an_error_that_says_so():
    gate = Gate()

    async def scenario(engine):
        stream = engine.submit(make(max_tokens=30, ignore_eos=True))
        await asyncio.to_thread(gate.reached.wait, 300)
        is_done = await asyncio.to_thread(engine.drain, 0.1)
        gate.opened.set()
        return is_done, (await collect(stream))[-1]

    with hosted(gate.load) as (engine, _):
        is_done, end = run(scenario(engine))
        assert not is_done
        assert end == Failed("the server stopped before the request was finished", is_shutdown=True)
        assert engine.state == "stopped"


def test_a_stuck_step_fails_the_engine_and_all_requests():
    gate = Gate()
    with hosted(gate.load, stall_s=0.3) as (engine, _):
        (events,) = run(collect_all(engine, [make(max_tokens=5, ignore_eos=True)]))
        assert events[-1].message.startswith("the engine is stuck: a step has taken")
        wait_for(lambda: engine.state == "failed")
        assert engine.failure.startswith("a step has taken")
        gate.opened.set()


def test_a_loop_that_does_not_read_holds_up_nothing_and_loses_nothing():
    async def scenario(engine, host):
        long = {"max_tokens": 40, "ignore_eos": True, "logprobs": 20}
        streams = [engine.submit(make(text, **long)) for text in "abcdefgh"]
        wait_for(lambda: host._worker.stats().requests == 8)  # blocks the loop meanwhile
        assert host._outbox.held_bytes > 0
        return [await collect(stream) for stream in streams]

    with hosted(up_bytes=4096) as (engine, host):
        told = run(scenario(engine, host))
        assert host._outbox.held_bytes == 0
    for events in told:
        assert sum(len(event.token_ids) for event in events[:-1]) == 40
        assert isinstance(events[-1], Finished)


def test_orders_that_the_socket_has_no_room_for_are_sent_later():
    async def scenario(engine):
        requests = [make("x" * 40, max_tokens=2) for _ in range(60)]
        streams = [engine.submit(request) for request in requests]
        assert engine._line._held
        return [(await collect(stream))[-1] for stream in streams]

    with hosted(down_bytes=2048) as (engine, _):
        assert all(isinstance(end, Finished) for end in run(scenario(engine)))


def test_a_second_loop_takes_over_from_one_that_is_closed():
    async def leave_one(engine):
        return engine.submit(make(max_tokens=40, ignore_eos=True))

    with hosted() as (engine, _):
        run(leave_one(engine))
        (events,) = run(collect_all(engine, [make(max_tokens=3)]))
        assert isinstance(events[-1], Finished)
        wait_for(lambda: engine.stats().cancelled == 1)


# --- parts


def test_an_outbox_beyond_its_bound_waits_for_its_reader_and_then_goes_on():
    theirs, ours = make_wires()
    with closing(theirs):
        ours.line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        outbox = Outbox(ours, most_bytes=50_000)
        frames = [bytes([number]) * 1000 for number in range(200)]
        thread = threading.Thread(target=lambda: [outbox.send(frame) for frame in frames])
        thread.start()
        wait_for(lambda: outbox.held_bytes > 50_000)
        assert not outbox.flush(0.01)
        assert thread.is_alive()
        assert outbox.held_bytes <= 51_000
        read = b""
        while len(read) < 200_000:
            read += theirs.read() or b""
        thread.join(300)
        assert outbox.flush(60)
        assert read == b"".join(frames)
        theirs.wait()  # it was rung
        assert theirs.read() is None
    outbox.send(b"more")
    ours.close()


def test_an_outbox_without_a_reader_drops_all_and_waits_for_nobody():
    theirs, ours = make_wires()
    outbox = Outbox(ours, most_bytes=1000)
    with closing(theirs):
        outbox.send(bytes(2**20))
        assert outbox.held_bytes > 0
    outbox.send(b"more")
    assert outbox.flush(60)
    assert outbox.held_bytes == 0
    ours.close()


def test_frames_are_whole_however_they_are_cut():
    spot = TokenLogprob(5, -0.5, ((5, -0.5),))
    entries = [(1, "a", (5,)), (2, Piece("b", (6,), 1)), (3, Piece("", (5,), 0, (spot,)))]
    turn = Turn(entries, [4], [5])
    data = pack_turn(turn) * 3 + pack(("end",))
    whole = list(Unpacker().push(data))
    assert whole[:3] == [(entries, [4], [5])] * 3
    for size in (1, 2, 3, 7, 100):
        unpacker, cut = Unpacker(), []
        for begin in range(0, len(data), size):
            cut += unpacker.push(data[begin : begin + size])
        assert cut == whole


def test_a_request_that_comes_too_late_for_the_engine_fails_as_a_shutdown():
    async def scenario(engine, host):
        with host._worker._changed:
            host._worker.state = "draining"
        event = (await collect(engine.submit(make())))[-1]
        host._worker.state = "ready"
        return event

    with hosted() as (engine, host):
        event = run(scenario(engine, host))
    assert event == Failed("the engine is draining; no request is accepted", is_shutdown=True)


def test_what_the_engine_logs_is_logged_here_with_its_traceback(caplog):
    from engine.remote_host import LogForwarder

    with hosted() as (_, host), caplog.at_level(logging.WARNING):
        forwarder = LogForwarder(host._reporter)
        try:
            raise ValueError("inside")
        except ValueError as error:
            caught = (ValueError, error, error.__traceback__)
        record = logging.LogRecord("far", logging.ERROR, "f", 1, "it %s", ({"x": 1},), caught)
        forwarder.handle(record)
        wait_for(lambda: any(one.name == "far" for one in caplog.records))
    record = next(one for one in caplog.records if one.name == "far")
    assert record.getMessage() == "it {'x': 1}"
    assert 'raise ValueError("inside")' in caplog.text


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (3, "it ended with status 3"),
        (-15, "it was ended by SIGTERM"),
        (-9, "it was ended by SIGKILL, which the system sends when memory runs out"),
    ],
)
def test_what_ended_a_process_is_told(status, text):
    assert tell_status(status) == text


# --- real processes


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(tiny_model(), path)
    return path


def test_a_process_serves_and_ends_with_the_drain(model):
    with spawned(model) as engine:
        assert engine.state == "ready", engine.failure
        assert engine.plan.parts()["process"] > 0
        assert engine.progress.read_bytes == engine.progress.total_bytes > 0
        (events,) = run(collect_all(engine, [make(max_tokens=5, ignore_eos=True, seed=1)]))
        assert engine.drain(60)
        assert (engine.state, engine.failure, engine.is_alive) == ("stopped", None, False)
    worker = Worker("tiny", load_tiny)
    worker.start()
    wait_for(lambda: worker.state == "ready")
    (expected,) = run(collect_all(worker, [make(max_tokens=5, ignore_eos=True, seed=1)]))
    worker.drain(60)
    assert untimed(events) == untimed(expected)


def test_a_process_that_is_killed_fails_the_engine_and_all_its_requests(model):
    async def scenario(engine):
        long = {"max_tokens": 60, "ignore_eos": True}
        streams = [engine.submit(make(text, **long)) for text in "abc"]
        await anext(streams[0])
        os.kill(engine._child.process.pid, signal.SIGKILL)
        return [(await collect(stream))[-1] for stream in streams]

    with spawned(model) as engine:
        ends = run(scenario(engine))
        assert ends == [Failed("the engine ended before the request was finished")] * 3
        wait_for(lambda: engine.state == "failed")
        assert "ended by itself: it was ended by SIGKILL" in engine.failure
        assert not engine.is_alive
        assert engine.stats().failed == 0  # the last that was heard
        with pytest.raises(EngineStopped, match="the engine is failed"):
            engine.require_room(1)


def test_a_process_that_cannot_carry_out_an_order_ends(model):
    with spawned(model) as engine:
        engine._child.wire.send(pack(TakeBack(99)))
        wait_for(lambda: engine.state == "failed")
        assert engine.failure == (
            "the process of the engine ended by itself: it ended with status 1"
        )


def test_a_process_that_says_nothing_is_given_up(model):
    with spawned(model, stall_s=0.5) as engine:
        os.kill(engine._child.process.pid, signal.SIGSTOP)
        wait_for(lambda: engine.state == "failed")
        assert "told nothing for 3.5 s" in engine.failure
        assert not engine.is_alive
