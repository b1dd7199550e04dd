"""Ten thousand requests that are given up: memory, queue and caches are as they were before.

The real engine behind the whole application, without sockets: each client goes at some moment of
its own choice, before its body is whole, while it waits, or in the midst of the reply. Clients on
real sockets are in `test_server_faults`.
"""

import asyncio
import gc
import json
import logging
import random
from collections import Counter
from contextlib import contextmanager

import pytest
import torch

from engine.adapters_manifest import write_manifest
from engine.memory import resident_bytes
from engine.scheduler import Limits
from engine.worker import LoadedModel, Worker
from server.app import create_app
from server.errors import CLIENT_GONE
from server.keys import hash_key, write_keys
from server.schemas_keys import KeyRecord
from server.settings import Settings
from tests.adapter_folders import adapter_files, write_files
from tests.tiny import DENSE, byte_tokenizer, tiny_model
from tests.waiting import wait_for

NUM_CLIENTS = 20  # at once
WARM_UP, NUM_ROUNDS = 1_000, 9_000
KEY = "a-key-for-tests-only"
CACHE_BYTES, KEPT_BYTES = 4_000_000, 30_000
LONG = {"max_tokens": 200, "ignore_eos": True}
# A leak of one small object by each request would be 9,000 of them, and 2 MB of 200 bytes each.
SLACK_OBJECTS = 1_500
SLACK_TENSOR_BYTES = 200_000  # a leak of one vector by each request would be 1.2 MB
SLACK_BYTES = 64 * 2**20  # what allocators keep goes up and down, after thousands of tests by more

BODIES = {
    "/v1/completions": (
        {"prompt": "hello", "stream": True} | LONG,
        {"prompt": ["hello", "you"], "n": 2, "logprobs": 2} | LONG,
        {"model": "task", "prompt": "hello", "stream": True, "n": 2} | LONG,
        {"prompt": "again and again", "cache_salt": "s", "echo": True} | LONG,
        {"prompt": "hello", "structured_outputs": {"regex": "[ab]+"}, "stream": True} | LONG,
        {"prompt": "hello", "stop": "no such text", "timeout": 30, "stream": True} | LONG,
    ),
    "/v1/chat/completions": (
        {"messages": [{"role": "user", "content": "hello"}], "stream": True} | LONG,
    ),
    "/v1/generate": (
        {"text": "hello", "use_beam_search": True, "num_beams": 3, "max_tokens": 60},
        {"text": "hello", "adapter": "task", "decoder_prompt": "you", "stream": True} | LONG,
    ),
    "/v1/score": ({"context": "hello", "continuations": ["a b c", "d"] * 20, "adapter": "task"},),
    "/v1/embeddings": ({"input": ["hello", "you"] * 2},),
    "/tokenize": ({"prompt": "hello " * 100},),
}


@contextmanager
def soaked(tmp_path):
    """An application with its worker: few rows, little memory, an adapter, a key with bounds."""
    write_files(tmp_path / "adapters" / "task" / "1", adapter_files())
    write_manifest(tmp_path / "adapters" / "task" / "1")
    record = KeyRecord(name="all", sha256=hash_key(KEY), max_concurrent=NUM_CLIENTS)
    write_keys(tmp_path / "keys", [record])
    limits = Limits(max_rows=4, cache_bytes=CACHE_BYTES, encoder_cache_bytes=KEPT_BYTES)
    loaded = LoadedModel(tiny_model(DENSE), byte_tokenizer())
    worker = Worker("tiny", lambda _: loaded, max_queue=50 * NUM_CLIENTS, limits=limits)
    worker.start()
    try:
        wait_for(lambda: worker.state == "ready")
        settings = Settings(
            adapters=tmp_path / "adapters", adapter_any_base=True, keys_file=tmp_path / "keys"
        )
        yield create_app(worker, settings), worker
    finally:
        worker.drain(5.0)


async def ask(app, path, raw, statuses, patience=None, stay_s=None):
    """One request of a client that goes after so many messages of the reply, or so long a time.

    Returns when the application has. Half a body comes in two pieces, of which one never does.
    """
    gone = asyncio.Event()
    parts = [{"type": "http.request", "body": raw, "more_body": not raw.endswith(b"}")}]

    async def receive():
        if parts:
            return parts.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        nonlocal patience
        if message["type"] == "http.response.start":
            statuses[message["status"]] += 1
        if patience is not None:
            patience -= 1
            if patience < 0:
                gone.set()

    headers = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [(name.encode(), value.encode()) for name, value in headers.items()],
        "scheme": "http",
        "server": ("a", 1),
        "client": ("b", 1),
        "root_path": "",
    }
    loop = asyncio.get_running_loop()
    leave = loop.call_later(stay_s, gone.set) if stay_s is not None else None
    await app(scope, receive, send)
    if leave is not None:
        leave.cancel()


async def soak(app, number, num_requests, statuses):
    """A client after the other, each of which goes at some moment."""
    draw = random.Random(number)
    for _ in range(num_requests // NUM_CLIENTS):
        path = draw.choice(list(BODIES))
        raw = json.dumps(draw.choice(BODIES[path])).replace("hello", "h" * draw.randint(1, 40))
        patience, stay_s = draw.choice([0, 0, 1, 2, 5]), draw.choice([0, 0, 0.002, 0.01, 0.04])
        raw = raw if draw.random() < 0.9 else raw[:9]
        await ask(app, path, raw.encode(), statuses, patience, stay_s)


def measure(worker):
    """Objects, bytes of tensors but for arenas of rows, which are not given back, and resident."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if type(one) is torch.Tensor]
    tensors = [one for one in tensors if one.layout is torch.strided]  # others are no test's here
    num_bytes = sum(one.nbytes for one in tensors) - worker._engine._batch.nbytes
    return len(gc.get_objects()), num_bytes, resident_bytes()


def require_empty(app, worker):
    """Nobody is left in the engine, and what may be kept is within its bounds."""
    wait_for(lambda: (worker.stats().running, worker.stats().queued) == (0, 0), what=worker.stats)
    stats, engine = worker.stats(), worker._engine
    assert stats.requests + stats.cancelled + stats.failed > 0
    assert stats.failed == 0
    assert stats.encoder_cache.nbytes <= KEPT_BYTES
    assert not worker._open
    assert not engine._jobs
    assert len(engine._batch._cache) == len(engine._courses) == engine._courses.nbytes == 0
    assert engine._batch.nbytes <= CACHE_BYTES
    store = app.state.adapters.store
    if store.resident():
        store.unload("task")
    gc.collect()
    assert store.snapshot().used_bytes == 0  # no request holds the adapter


@pytest.mark.slow
def test_10_000_requests_that_are_given_up_leave_nothing_behind(tmp_path, caplog):
    caplog.set_level(logging.CRITICAL)  # a line for each request is kept by the fixture
    with soaked(tmp_path) as (app, worker):

        async def scenario(num_requests):
            statuses = Counter()
            clients = range(NUM_CLIENTS)
            await asyncio.gather(*(soak(app, i, num_requests, statuses) for i in clients))
            assert len(asyncio.all_tasks()) == 1
            given_up = statuses.copy()
            await ask(app, "/v1/completions", b'{"prompt": "a", "max_tokens": 1}', statuses)
            assert statuses[200] == given_up[200] + 1  # who stays is answered
            await asyncio.to_thread(require_empty, app, worker)
            return statuses

        with asyncio.Runner() as runner:
            warm = runner.run(scenario(WARM_UP))
            before = measure(worker)
            statuses = runner.run(scenario(NUM_ROUNDS))
            after = measure(worker)
    # what is written for who has gone already; never 429: each that goes gives up its place
    assert (warm + statuses).keys() == {200, CLIENT_GONE}
    assert worker.stats().cancelled > (WARM_UP + NUM_ROUNDS) / 4  # others were never begun
    assert after[0] < before[0] + SLACK_OBJECTS, (before, after)
    assert after[1] < before[1] + KEPT_BYTES + SLACK_TENSOR_BYTES, (before, after)
    assert after[2] < before[2] + SLACK_BYTES, (before, after)
