import asyncio
import itertools
import logging
import os
import random
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import perf_counter

import pytest

from engine.checkpoint import save_model
from engine.errors import (
    CheckpointError,
    EngineStopped,
    Overloaded,
    RequestError,
    TokenizerError,
)
from engine.experts import load_offloaded
from engine.generation import generate
from engine.pace import NUM_ENDS
from engine.prompt import build_request
from engine.request import (
    BeamParams,
    Continuations,
    Embedded,
    Failed,
    Finished,
    Piece,
    Pooling,
    Request,
    SamplingParams,
    Searched,
)
from engine.scheduler import Limits
from engine.stats import CacheStats
from engine.worker import LoadedModel, Worker
from tests.tiny import MOE, byte_tokenizer, tiny_model
from tests.waiting import wait_for

TOKENIZER = byte_tokenizer()
TIMEOUT_S = 300


def request(text="hello", request_id="r", **params) -> Request:
    return build_request(text, TOKENIZER, MOE, SamplingParams(**params), request_id)


def load(report):
    report("reading weights")
    return LoadedModel(tiny_model(), TOKENIZER)


def ready_worker(**settings) -> Worker:
    worker = Worker("tiny", load, **settings)
    worker.start()
    wait_for(lambda: worker.state == "ready")
    return worker


async def collect(stream) -> list:
    return [event async for event in stream]


def run(coroutine):
    return asyncio.run(asyncio.wait_for(coroutine, TIMEOUT_S))


class Gate:
    """A loader whose model waits at its first decoder step until it is opened."""

    def __init__(self) -> None:
        self.reached, self.opened = threading.Event(), threading.Event()

    def load(self, report):
        loaded = load(report)
        step = loaded.model.step

        def gated(*args):
            self.reached.set()
            assert self.opened.wait(TIMEOUT_S)
            return step(*args)

        loaded.model.step = gated
        return loaded


def test_a_request_gives_the_events_of_a_plain_run():
    worker = ready_worker()

    async def scenario():
        return await collect(worker.submit(request(max_tokens=6, temperature=1.0, seed=3)))

    events = run(scenario())
    expected = list(
        generate(tiny_model(), TOKENIZER, request(max_tokens=6, temperature=1.0, seed=3))
    )
    assert events[:-1] == expected[:-1]
    assert events[-1].reason == expected[-1].reason
    stats = worker.stats()
    assert (stats.requests, stats.prompt_tokens) == (1, 6)
    assert worker.drain(TIMEOUT_S)


def test_every_one_of_many_requests_ends_in_finished():
    worker = ready_worker()

    async def scenario():
        streams = [worker.submit(request(f"text {i}", f"r{i}", max_tokens=3)) for i in range(10)]
        return await asyncio.gather(*map(collect, streams))

    assert all(isinstance(events[-1], Finished) for events in run(scenario()))
    assert worker.drain(TIMEOUT_S)


def test_offloaded_experts_are_counted(tmp_path):
    save_model(tiny_model(), tmp_path / "m")

    def load_with_budget(report):
        model, experts = load_offloaded(tmp_path / "m", None, 60_000)
        return LoadedModel(model, TOKENIZER, experts, close=experts.close)

    worker = Worker("tiny", load_with_budget)
    assert worker.stats().experts is None
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        return await collect(worker.submit(request(max_tokens=6, temperature=1.0, seed=3)))

    events = run(scenario())
    expected = generate(tiny_model(), TOKENIZER, request(max_tokens=6, temperature=1.0, seed=3))
    assert events[:-1] == list(expected)[:-1]
    assert worker.stats().experts.misses > 0
    assert events[-1].experts == worker.stats().experts  # the only request so far
    again = run(scenario())[-1].experts
    assert again.hits + events[-1].experts.hits == worker.stats().experts.hits
    assert worker.drain(TIMEOUT_S)


def test_an_expert_that_cannot_be_read_fails_its_requests_and_the_worker_goes_on(tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    file = tmp_path / "m" / "experts-decoder-1.safetensors"
    data = file.read_bytes()

    def load_with_budget(report):
        model, experts = load_offloaded(tmp_path / "m", None, 60_000)
        return LoadedModel(model, TOKENIZER, experts, close=experts.close)

    worker = Worker("tiny", load_with_budget)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        return await collect(worker.submit(request(max_tokens=6, temperature=1.0, seed=3)))

    before = run(scenario())
    with file.open("r+b") as opened:
        opened.truncate(5000)
    failed = run(scenario())
    assert isinstance(failed[-1], Failed)
    with file.open("r+b") as opened:
        opened.write(data)
    assert run(scenario())[:-1] == before[:-1]
    assert worker.state == "ready"
    assert worker.drain(TIMEOUT_S)


def test_loading_is_told_apart_from_ready_and_refuses_requests():
    gate = threading.Event()

    def slow_load(report):
        report("reading weights")
        assert gate.wait(TIMEOUT_S)
        return load(report)

    worker = Worker("tiny", slow_load)
    assert worker.state == "starting"
    worker.start()
    wait_for(lambda: worker.phase == "reading weights")
    assert worker.state == "loading"
    with pytest.raises(EngineStopped, match="not loaded: reading weights"):
        _ = worker.config

    async def scenario():
        with pytest.raises(EngineStopped, match="the engine is loading"):
            worker.submit(request())

    run(scenario())
    gate.set()
    wait_for(lambda: worker.state == "ready")
    assert worker.config == MOE
    assert worker.drain(TIMEOUT_S)


def test_a_model_that_cannot_be_loaded_leaves_the_reason():
    def bad_load(report):
        raise CheckpointError("x: is empty")

    worker = Worker("tiny", bad_load)
    worker.start()
    wait_for(lambda: worker.state == "failed")
    assert worker.failure == "x: is empty"
    with pytest.raises(EngineStopped, match="not loaded: x: is empty"):
        _ = worker.tokenizer
    assert worker.drain(TIMEOUT_S)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vocab_size": 300}, "the tokenizer names 384 tokens, the model has 300"),
        ({"continuation_sentinel": 125}, "there is no sentinel 125; allowed: -125 to 124"),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(change, message):
    with pytest.raises(TokenizerError, match=message):
        LoadedModel(tiny_model(replace(MOE, **change)), TOKENIZER)


def test_draining_does_not_wait_for_a_model_that_is_being_loaded():
    gate = threading.Event()

    def slow_load(report):
        report("reading weights")
        assert gate.wait(TIMEOUT_S)
        return load(report)

    worker = Worker("tiny", slow_load)
    worker.start()
    wait_for(lambda: worker.phase == "reading weights")
    began = perf_counter()
    assert not worker.drain(TIMEOUT_S)
    assert perf_counter() - began < TIMEOUT_S / 2
    assert (worker.state, worker.phase) == ("draining", "draining")
    gate.set()
    wait_for(lambda: worker.state == "stopped")


def test_a_full_queue_is_an_error_and_the_others_are_served():
    gate = Gate()
    worker = Worker("tiny", gate.load, max_queue=2)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        running = worker.submit(request(max_tokens=2))
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
        waiting = [worker.submit(request(max_tokens=2)) for _ in range(2)]
        assert (worker.stats().running, worker.stats().queued) == (1, 2)
        with pytest.raises(Overloaded, match="2 requests are waiting"):
            worker.submit(request())
        gate.opened.set()
        return await asyncio.gather(*map(collect, [running, *waiting]))

    assert all(isinstance(events[-1], Finished) for events in run(scenario()))
    assert worker.drain(TIMEOUT_S)


def test_closing_a_stream_ends_the_request_at_its_next_step():
    gate = Gate()
    worker = Worker("tiny", gate.load)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        stream = worker.submit(request(max_tokens=200, temperature=1.0))
        waiting = worker.submit(request(max_tokens=200))
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
        await waiting.aclose()  # before it was begun
        await stream.aclose()
        gate.opened.set()
        return await collect(worker.submit(request(max_tokens=1))), await collect(stream)

    events, after_close = run(scenario())
    assert isinstance(events[-1], Finished)
    assert after_close == []
    assert worker.stats().requests == 1  # the two closed ones were not finished
    assert worker.drain(TIMEOUT_S)


@pytest.mark.parametrize("max_tokens", [1, 200])
def test_the_step_under_way_when_a_stream_is_closed_is_told_to_who_counts(max_tokens):
    gate = Gate()
    worker = Worker("tiny", gate.load)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        late = []
        stream = worker.submit(request(max_tokens=max_tokens, temperature=1.0, seed=1))
        stream.count_late(late.append)
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
        await stream.aclose()
        gate.opened.set()
        await collect(worker.submit(request(max_tokens=1)))  # its end comes after that step
        return late

    try:
        late = run(scenario())
    finally:
        gate.opened.set()
        worker.drain(TIMEOUT_S)
    assert sum(len(event.token_ids) for event in late if isinstance(event, Piece)) in (1, 2)
    ends = [event.completion_tokens for event in late if isinstance(event, Finished)]
    assert ends == ([1] if max_tokens == 1 else [])
    assert (worker.stats().requests, worker.stats().cancelled) == (1, 1)


def test_a_request_that_breaks_is_told_and_the_next_is_served():
    def broken_once(report):
        loaded = load(report)
        encode, calls = loaded.model.encode_layers, []

        def fails_first(*args):
            calls.append(args)
            if len(calls) == 1:
                raise RuntimeError("out of memory at 0xdeadbeef")
            return encode(*args)

        loaded.model.encode_layers = fails_first
        return loaded

    worker = Worker("tiny", broken_once)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        return [await collect(worker.submit(request(max_tokens=1))) for _ in range(2)]

    first, second = run(scenario())
    assert first == [Failed("the engine could not read the prompt: RuntimeError")]
    assert isinstance(second[-1], Finished)
    assert worker.drain(TIMEOUT_S)


def test_draining_finishes_what_was_accepted_and_refuses_the_rest():
    gate = Gate()
    worker = Worker("tiny", gate.load)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        streams = [worker.submit(request(max_tokens=2)) for _ in range(3)]
        drain = asyncio.create_task(asyncio.to_thread(worker.drain, TIMEOUT_S))
        await asyncio.to_thread(wait_for, lambda: worker.state == "draining")
        with pytest.raises(EngineStopped, match="the engine is draining"):
            worker.submit(request())
        gate.opened.set()
        events = await asyncio.gather(*map(collect, streams))
        return events, await drain

    events, drained = run(scenario())
    assert drained
    assert worker.state == "stopped"
    assert all(isinstance(one[-1], Finished) for one in events)


def test_draining_that_takes_too_long_fails_what_is_left():
    gate = Gate()
    worker = Worker("tiny", gate.load)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        streams = [worker.submit(request(max_tokens=2)) for _ in range(2)]
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
        assert not await asyncio.to_thread(worker.drain, 0.05)
        return await asyncio.gather(*map(collect, streams))

    for events in run(scenario()):
        text = "the server stopped before the request was finished"
        assert events == [Failed(text, is_shutdown=True)]
    gate.opened.set()
    wait_for(lambda: worker.state == "stopped")


def test_closed_requests_hold_no_place_in_the_queue():
    gate = Gate()
    worker = Worker("tiny", gate.load, max_queue=1)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        worker.submit(request(max_tokens=1))
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
        await worker.submit(request(max_tokens=1)).aclose()
        assert worker.stats().queued == 0
        kept = worker.submit(request(max_tokens=1))
        gate.opened.set()
        return await collect(kept)

    assert isinstance(run(scenario())[-1], Finished)
    assert worker.drain(TIMEOUT_S)


def test_a_broken_engine_thread_leaves_no_request_waiting():
    submitted = threading.Event()

    def fails_our_own_check(report):
        loaded = load(report)

        def encode(*args):
            assert submitted.wait(TIMEOUT_S)
            raise AssertionError("our mistake")

        loaded.model.encode_layers = encode
        return loaded

    worker = Worker("tiny", fails_our_own_check)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        streams = [worker.submit(request(max_tokens=1)) for _ in range(2)]
        submitted.set()
        return await asyncio.gather(*map(collect, streams), return_exceptions=True)

    results = run(scenario())
    ended = [Failed("the engine ended before the request was finished")]
    assert results[0] == ended
    assert results[1] == ended
    wait_for(lambda: worker.state == "failed")
    assert worker.failure == "the engine thread broke"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_whatever_a_library_raises_ends_the_thread_no_request_waits_for_ever():
    def exits(report):
        loaded = load(report)

        def encode(*args):
            raise SystemExit  # no Exception, as the panics of libraries in Rust are none

        loaded.model.encode_layers = encode
        return loaded

    worker = Worker("tiny", exits, stall_s=30.0)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        return await collect(worker.submit(request(max_tokens=1)))

    assert run(scenario()) == [Failed("the engine ended before the request was finished")]
    wait_for(lambda: not worker.is_alive)
    assert (worker.state, worker.failure) == ("failed", "the engine thread broke")
    assert worker._ended.is_set()  # so its watch ends as well


def test_pieces_carry_their_tokens():
    worker = ready_worker()

    async def scenario():
        return await collect(worker.submit(request(max_tokens=4, temperature=1.0, seed=1)))

    events = run(scenario())
    tokens = [t for e in events if isinstance(e, Piece) for t in e.token_ids]
    assert events[-1].completion_tokens in (len(tokens), len(tokens) + 1)  # an end mark is no text
    assert worker.drain(TIMEOUT_S)


def test_a_listener_whose_loop_is_gone_does_not_hurt_the_engine():
    gate = Gate()
    worker = Worker("tiny", gate.load)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def leave():
        worker.submit(request(max_tokens=3))
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)

    run(leave())
    gate.opened.set()

    async def scenario():
        return await collect(worker.submit(request(max_tokens=1)))

    assert isinstance(run(scenario())[-1], Finished)
    assert worker.drain(TIMEOUT_S)


def test_closing_a_stream_wakes_who_waits_for_it():
    gate = Gate()
    worker = Worker("tiny", gate.load)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        stream = worker.submit(request(max_tokens=2))
        reader = asyncio.create_task(collect(stream))
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
        await stream.aclose()
        return await reader

    try:
        assert run(scenario()) == []
    finally:
        gate.opened.set()
    assert worker.drain(TIMEOUT_S)


def test_a_model_that_arrives_after_the_drain_is_closed():
    gate, closed = threading.Event(), threading.Event()

    def slow_load(report):
        report("reading weights")
        assert gate.wait(TIMEOUT_S)
        return replace(load(report), close=closed.set)

    worker = Worker("tiny", slow_load)
    worker.start()
    wait_for(lambda: worker.phase == "reading weights")
    assert not worker.drain(0.0)
    gate.set()
    wait_for(lambda: worker.state == "stopped")
    assert closed.is_set()
    assert worker.phase == "stopped"


def test_a_request_that_the_drain_ended_is_not_counted_as_finished():
    gate = Gate()
    worker = Worker("tiny", gate.load)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        stream = worker.submit(request(max_tokens=1))
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
        assert not await asyncio.to_thread(worker.drain, 0.0)
        gate.opened.set()
        await asyncio.to_thread(wait_for, lambda: worker.state == "stopped")
        return await collect(stream)

    assert [type(event) for event in run(scenario())] == [Failed]
    assert worker.stats().requests == 0


def test_the_wait_that_is_told_follows_the_pace():
    gate = Gate()
    worker = Worker("tiny", gate.load, max_queue=4)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def refused():
        with pytest.raises(Overloaded) as caught:
            worker.submit(request())
        return caught.value.retry_after_s

    async def scenario():
        gate.opened.set()
        began = perf_counter()
        for _ in range(NUM_ENDS):
            await collect(worker.submit(request(max_tokens=1)))
        pace_s = (perf_counter() - began) / NUM_ENDS
        gate.reached.clear()
        gate.opened.clear()
        running = worker.submit(request(max_tokens=1))
        await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
        waiting = [worker.submit(request(max_tokens=1)) for _ in range(4)]
        wait_s = await refused()
        gate.opened.set()
        await asyncio.gather(*map(collect, [running, *waiting]))
        return wait_s, pace_s

    wait_s, pace_s = run(scenario())
    assert 0 < wait_s <= 2 * pace_s  # half of those that wait; the engine is a part of all
    assert worker.drain(TIMEOUT_S)


# --- bounds of the queue


async def begun(gate, worker, **more):
    """A request that runs and holds the engine until the gate is opened."""
    running = worker.submit(request(**more))
    await asyncio.to_thread(gate.reached.wait, TIMEOUT_S)
    return running


def gated_worker(**settings):
    gate = Gate()
    worker = Worker("tiny", gate.load, **settings)
    worker.start()
    wait_for(lambda: worker.state == "ready")
    return gate, worker


def test_the_queue_is_bounded_by_tokens_as_well():
    gate, worker = gated_worker(max_queue_tokens=60)

    async def scenario():
        streams = [await begun(gate, worker, max_tokens=2)]
        streams.append(worker.submit(request("a" * 90, max_tokens=5)))  # the only one may
        with pytest.raises(Overloaded, match="1 requests are waiting already, .* 60 tokens"):
            worker.submit(request(max_tokens=5))
        assert (worker.stats().queued, worker.stats().queued_tokens) == (1, 96)
        gate.opened.set()
        return await asyncio.gather(*map(collect, streams))

    assert all(isinstance(events[-1], Finished) for events in run(scenario()))
    assert worker.stats().queued_tokens == 0
    assert worker.drain(TIMEOUT_S)


def test_no_key_fills_the_queue_for_all():
    gate, worker = gated_worker(max_queue=8)

    def ask(key):
        return worker.submit(replace(request(max_tokens=1), key=key))

    async def scenario():
        streams = [await begun(gate, worker, max_tokens=1)]
        streams += [ask("a") for _ in range(4)]
        with pytest.raises(Overloaded, match="4 requests of this key"):
            ask("a")
        with pytest.raises(Overloaded, match="of this key"):
            worker.require_room(1, key="a")
        streams += [ask("b") for _ in range(2)]
        worker.require_room(2)
        with pytest.raises(Overloaded, match="6 requests are waiting already"):
            worker.require_room(3)
        gate.opened.set()
        return await asyncio.gather(*map(collect, streams))

    assert all(isinstance(events[-1], Finished) for events in run(scenario()))
    assert worker.drain(TIMEOUT_S)
    with pytest.raises(EngineStopped, match="the engine is stopped"):
        worker.require_room(1)


def test_what_can_never_be_carried_out_is_refused():
    worker = ready_worker(limits=Limits(cache_bytes=10_000))

    async def scenario():
        with pytest.raises(RequestError, match="at least one choice"):
            worker.submit(replace(request(), task=Continuations(choices=())))
        with pytest.raises(RequestError, match="a search of 4 beams takes"):
            worker.submit(replace(request(max_tokens=50), task=BeamParams()))

    run(scenario())
    assert worker.drain(TIMEOUT_S)


def test_tasks_are_answered_and_ends_are_counted():
    gate, worker = gated_worker()

    async def scenario():
        searched = worker.submit(replace(request(max_tokens=4), task=BeamParams(num_beams=2)))
        vector = worker.submit(replace(request(), task=Pooling()))
        late = worker.submit(replace(request(), deadline_s=1e-6))
        closed = worker.submit(request(max_tokens=50, ignore_eos=True))
        await closed.aclose()
        gate.opened.set()
        return [await collect(stream) for stream in (searched, vector, late)]

    searched, vector, late = run(scenario())
    assert [type(event) for event in searched] == [Searched, Finished]
    assert [type(event) for event in vector] == [Embedded, Finished]
    assert [event.is_late for event in late] == [True]
    stats = worker.stats()
    assert (stats.requests, stats.failed, stats.cancelled) == (2, 1, 1)
    assert (stats.max_rows, stats.encoder_cache) == (32, CacheStats(0, 0, 0))
    assert worker.drain(TIMEOUT_S)


# --- what cannot be mended


def test_a_step_that_hangs_fails_the_worker_and_all_its_requests(caplog):
    gate, worker = gated_worker(stall_s=2.0)
    assert worker.stalled_s() == 0

    async def scenario():
        streams = [await begun(gate, worker, max_tokens=2)]
        streams += [worker.submit(request(max_tokens=2)) for _ in range(2)]
        assert worker.stalled_s() > 0
        return await asyncio.gather(*map(collect, streams))

    try:
        for events in run(scenario()):
            (failed,) = events
            assert failed.message.startswith("the engine is stuck: a step has taken ")
        assert (worker.state, worker.is_alive) == ("failed", True)
        assert worker.failure.endswith("the limit is 2 s")
        assert "self.opened" in caplog.text or "gated" in caplog.text  # where it hangs
        assert worker.stats().failed == 3
        assert not worker.drain(0.0)
    finally:
        gate.opened.set()
    wait_for(lambda: not worker.is_alive)
    assert worker.state == "failed"


def test_a_worker_that_goes_on_is_left_alone_by_its_watch():
    threads = threading.active_count()
    worker = ready_worker(stall_s=30.0)

    async def scenario():
        return await collect(worker.submit(request(max_tokens=6)))

    assert isinstance(run(scenario())[-1], Finished)
    assert (worker.state, worker.stalled_s()) == ("ready", 0.0)
    assert worker.drain(TIMEOUT_S)
    worker._ended.wait(TIMEOUT_S)
    wait_for(lambda: threading.active_count() <= threads)  # others may end


def test_a_device_that_is_lost_fails_the_worker_for_good():
    submitted = threading.Event()

    def load_lost(report):
        loaded = load(report)

        def step(*_):
            assert submitted.wait(TIMEOUT_S)
            raise RuntimeError("CUDA error: device-side assert triggered")

        loaded.model.step = step
        return loaded

    worker = Worker("tiny", load_lost)
    worker.start()
    wait_for(lambda: worker.state == "ready")

    async def scenario():
        streams = [worker.submit(request(max_tokens=2)) for _ in range(2)]
        submitted.set()
        return await asyncio.gather(*map(collect, streams))

    ended = [Failed("the engine ended before the request was finished")]
    assert run(scenario()) == [ended, ended]
    wait_for(lambda: not worker.is_alive)
    assert worker.state == "failed"
    assert worker.failure.startswith("the device has failed: CUDA error: device-side assert")


def test_experts_that_arrive_after_the_drain_are_closed(tmp_path):
    save_model(tiny_model(), tmp_path / "m")
    gate, threads, opened = threading.Event(), threading.active_count(), []

    def num_stores():
        links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return sum(os.path.realpath(link).startswith(str(tmp_path)) for link in links)

    def slow_load(report):
        report("reading weights")
        assert gate.wait(TIMEOUT_S)
        model, experts = load_offloaded(tmp_path / "m", None, 60_000)
        opened.append(num_stores())
        return LoadedModel(model, TOKENIZER, experts, close=experts.close)

    worker = Worker("tiny", slow_load)
    worker.start()
    wait_for(lambda: worker.phase == "reading weights")
    assert not worker.drain(0.0)
    gate.set()
    wait_for(lambda: not worker.is_alive)
    assert worker.state == "stopped"
    assert opened[0] >= 4  # a store for each layer
    assert num_stores() == 0
    wait_for(lambda: threading.active_count() <= threads)  # others may end


def test_a_model_that_does_not_fit_its_tokenizer_is_closed():
    closed = []
    model = tiny_model(replace(MOE, vocab_size=300))
    with pytest.raises(TokenizerError):
        LoadedModel(model, TOKENIZER, close=lambda: closed.append(True))
    assert closed == [True]


# --- all at once


def submit_unless_full(worker, asked):
    try:
        return worker.submit(asked)
    except Overloaded:
        return None


TASKS = (None, None, BeamParams(num_beams=3), Continuations(choices=((65,), (66, 67))), Pooling())


def draw_request(draw, name, index):
    """Something of everything that a request may ask for."""
    task = draw.choice(TASKS)
    asked = request(
        "a" * draw.randint(1, 30),
        name,
        max_tokens=draw.randint(1, 4),
        temperature=draw.choice([0.0, 1.5]),
        seed=index,
        stop=draw.choice([(), ("b", "ab")]),
    )
    return replace(
        asked,
        task=task,
        key=draw.choice(["", "k", "l"]),
        priority=draw.choice([0, 0, 1]),
        deadline_s=draw.choice([None, None, 0.002, 0.05, 60.0]),
        salt=draw.choice([None, "s"]),
        decoder_ids=() if isinstance(task, Pooling) else draw.choice([(), (65,), (66, 67, 68)]),
    )


async def serve_some(worker, number, ends):
    """Send requests one after the other; some are closed before, some while they are served."""
    draw = random.Random(number)
    for index in range(100):
        asked = draw_request(draw, f"{number}-{index}", index)
        while (stream := submit_unless_full(worker, asked)) is None:
            ends["refused"] += 1
            await asyncio.sleep(0.005)
        patience = draw.choice([0, 1, 2, 99, 99, 99])  # events
        events = []
        while len(events) < patience and (event := await anext(stream, None)) is not None:
            events.append(event)
        await stream.aclose()
        assert await collect(stream) == []
        last = [isinstance(event, Finished | Failed) for event in events]
        assert sum(last) == sum(last[-1:])  # nothing after an end
        is_cancelled = not any(last)
        assert not is_cancelled or len(events) == patience
        ends["cancelled" if is_cancelled else type(events[-1]).__name__] += 1
        ends["late"] += any(getattr(event, "is_late", False) for event in events)
        ends["timeout"] += any(getattr(event, "stop_reason", "") == "timeout" for event in events)
        ends["cached"] += any(getattr(event, "cached_tokens", 0) for event in events)


class BrittleExperts:
    """Experts that cannot be read now and then."""

    def __init__(self, experts, sometimes):
        self.experts, self.sometimes = experts, sometimes

    def foresee(self, layer, x):
        pass

    def stream(self, layer, wanted):
        self.sometimes(CheckpointError("cannot be read"), 397)
        return self.experts.stream(layer, wanted)


class BrittleTokenizer:
    """A tokenizer that cannot spell now and then."""

    def __init__(self, sometimes):
        self.sometimes = sometimes

    def __getattr__(self, name):
        if name == "spell":
            self.sometimes(TokenizerError("the vocabulary is damaged"), 61)
        return getattr(TOKENIZER, name)


def load_brittle(report):
    """A model of which every part fails now and then."""
    turns = itertools.count(1)

    def sometimes(error, often):
        if next(turns) % often == 0:
            raise error

    def brittle(call, often):
        def called(*args):
            sometimes(MemoryError(), often)
            return call(*args)

        return called

    model = tiny_model(replace(MOE, num_decoder_layers=1))
    experts = model.experts
    del model.experts
    model.experts = BrittleExperts(experts, sometimes)
    cross = model.decoder.blocks()[0].cross_attention
    for part, name, often in (
        (model, "encode_layers", 41),
        (model, "step", 97),
        (model, "decode", 23),
        (model, "logits", 151),  # beside the sampler
        (cross, "project", 53),
    ):
        setattr(part, name, brittle(getattr(part, name), often))
    report("reading weights")
    return LoadedModel(model, BrittleTokenizer(sometimes))


@pytest.mark.slow  # 2,000 requests
def test_thousands_of_requests_with_cancels_and_failures_leave_nothing_behind(caplog):
    caplog.set_level(logging.CRITICAL)  # hundreds of failures, each with its stack
    threads = threading.active_count()
    limits = Limits(max_rows=8, window_s=0.001, cache_bytes=300_000, encoder_cache_bytes=30_000)
    worker = Worker(
        "tiny", load_brittle, max_queue=8, limits=limits, max_queue_tokens=400, stall_s=60.0
    )
    worker.start()
    wait_for(lambda: worker.state == "ready")
    ends = Counter()

    async def scenario():
        await asyncio.gather(*(serve_some(worker, number, ends) for number in range(20)))

    asyncio.run(asyncio.wait_for(scenario(), 480))
    wait_for(lambda: not (worker.stats() and worker._open))
    wait_for(lambda: not worker.stats().running)
    assert ends["Finished"] + ends["Failed"] + ends["cancelled"] == 2000
    assert ends["Finished"] > 200
    assert min(ends[name] for name in ("cancelled", "refused", "Failed", "late", "cached")) > 0
    stats, engine = worker.stats(), worker._engine
    assert (stats.queued, stats.queued_tokens, stats.running) == (0, 0, 0)
    assert stats.requests + stats.failed + stats.cancelled == 2000
    assert stats.requests >= ends["Finished"]
    assert stats.failed >= ends["Failed"]
    assert stats.encoder_cache.nbytes <= 30_000
    assert stats.encoder_cache.hits >= ends["cached"]
    assert not engine._jobs
    assert not len(engine.scheduler)
    assert len(engine._batch._cache) == len(engine._courses) == engine._courses.nbytes == 0
    assert worker.drain(TIMEOUT_S)
    wait_for(lambda: threading.active_count() <= threads)  # others may end
