"""Clients that vanish, stall or send without end, and what the server has left of them: nothing.

Real sockets and the real engine. After each case every request has had an end, by the counts of the
engine and by the metrics, and rows, queue, tasks and file descriptors are as before. Processes that
are killed or stopped under load are in `test_server_crashes`; that replies under load are of one
version of an adapter, whole, is in `test_server_adapters`.
"""

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
import uvicorn
from fastapi import Request as HttpRequest
from starlette.requests import ClientDisconnect

from engine.adapter_upload import PREFIX
from engine.scheduler import Limits
from engine.worker import LoadedModel, Worker
from server.app import create_app
from server.connections import PatientProtocol
from server.gateway import BUILDER_THREADS, MAX_WAITING, Gateway
from server.metrics import Metrics
from server.settings import Settings
from tests.adapter_folders import adapter_files, make_tar, vectors, write_files
from tests.fakes import FakeEngine
from tests.tiny import byte_tokenizer, tiny_model
from tests.waiting import wait_for

URL = "/v1/completions"
KEY = "a-key-for-tests-only"
AUTH = {"authorization": f"Bearer {KEY}"}
LONG = {"prompt": "hello", "max_tokens": 200, "ignore_eos": True}
MAX_ROWS = 4
IDLE_THREADS = 45  # of pools, which keep them
ABRUPT = struct.pack("ii", 1, 0)  # SO_LINGER: no goodbye


class Level(NamedTuple):
    """What must be the same before and after."""

    rows: int
    queued: int
    tasks: int
    files: int
    body_bytes: int


class CountingWorker(Worker):
    """Counts what it accepts."""

    num_accepted = 0

    def submit(self, request):
        ticket = super().submit(request)
        self.num_accepted += 1
        return ticket


class Hasty(PatientProtocol):
    write_s = 0.5


class Unhurried(PatientProtocol):
    """For clients that are as slow as the machine."""

    head_s = write_s = 300.0


class House:
    """A server in a thread of this process, with its engine."""

    def __init__(self, worker, server, address):
        self.worker = worker
        self.server = server
        self.address = address
        self.url = f"http://{address[0]}:{address[1]}"
        self.loop = None

    def level(self):
        async def count():  # on the loop, where no connection is half closed
            files = num_files()
            return len(asyncio.all_tasks()), files, body_room(self.server.config.app).used

        stats = self.worker.stats()
        counts = asyncio.run_coroutine_threadsafe(count(), self.loop).result(300)
        return Level(stats.running, stats.queued, *counts)

    def is_idle(self):
        state = self.server.server_state
        return not state.connections and not state.tasks

    def samples(self):
        """The counts of choices by end."""
        told = Counter()
        reply = httpx2.get(f"{self.url}/metrics", headers=AUTH, timeout=300)
        for line in reply.text.splitlines():
            if line.startswith("infmoe_finished_total{"):
                name, value = line.split()
                told[name.split('"')[1]] = int(float(value))
        return told


def num_files():
    return len(list(Path("/proc/self/fd").iterdir()))


def body_room(app):
    """Where the bytes of bodies are counted, among the layers."""
    return next(m.kwargs["room"] for m in app.user_middleware if "room" in m.kwargs)


@contextlib.contextmanager
def house_of(worker, protocol=Unhurried, send_bytes=None, **settings):
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    if send_bytes is not None:  # its connections inherit it
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
    app = create_app(worker, Settings(**{"body_timeout_s": 300.0} | settings))
    config = uvicorn.Config(
        app, http=protocol, lifespan="off", ws="none", log_config=None, access_log=False
    )
    server = uvicorn.Server(config)
    house = House(worker, server, listener.getsockname())

    async def serve():
        house.loop = asyncio.get_running_loop()
        await server.serve(sockets=[listener])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        wait_for(lambda: server.started)
        yield house
    finally:
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive()


@contextlib.contextmanager
def working(model=None, **options):
    limits = Limits(max_rows=MAX_ROWS)
    loaded = LoadedModel(model or tiny_model(), byte_tokenizer())
    worker = CountingWorker("tiny", lambda _: loaded, limits=limits, **options)
    worker.start()
    try:
        wait_for(lambda: worker.state == "ready")
        yield worker
    finally:
        worker.drain(5.0)


@contextlib.contextmanager
def nothing_left(house):
    """All that was begun in here has ended, and nothing is left of it."""
    with httpx2.Client(base_url=house.url, headers=AUTH, timeout=300) as client:  # warm up
        assert client.post(URL, json={"prompt": "a", "max_tokens": 1}).status_code == 200
    wait_for(house.is_idle)
    before = house.level()
    ended_before, accepted_before = house.samples().total(), house.worker.num_accepted
    threads_before = threading.active_count()
    yield
    wait_for(house.is_idle)
    wait_for(lambda: house.level() == before, what=lambda: (before, house.level()))
    # of the last step the counts come after the rows are free
    wait_for(lambda: num_ended(house.worker) == house.worker.num_accepted, what=house.worker.stats)
    num_accepted = house.worker.num_accepted - accepted_before
    assert house.samples().total() - ended_before == num_accepted
    assert threading.active_count() < threads_before + IDLE_THREADS


def num_ended(worker):
    stats = worker.stats()
    return stats.requests + stats.cancelled + stats.failed


def request_bytes(body, path=URL, headers=()):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    told = {"host": "localhost", "content-type": "application/json", **AUTH}
    told = told | {"content-length": str(len(data))} | dict(headers)
    lines = "".join(f"{name}: {value}\r\n" for name, value in told.items())
    return f"POST {path} HTTP/1.1\r\n{lines}\r\n".encode() + data


def connect(house, receive_bytes=None):
    client = socket.socket()
    if receive_bytes is not None:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    client.settimeout(300)
    client.connect(house.address)
    return client


@contextlib.contextmanager
def connected(house, num_clients, **how):
    """So many clients, none of which is left open, whatever happens."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(connect(house, **how)) for _ in range(num_clients)]


def read_all(client):
    """What comes until the connection ends, however it does."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while part := client.recv(65_536):
            received += part
    return received


@pytest.fixture(scope="module")
def worker():
    with working(max_queue=512) as worker:
        yield worker


@pytest.fixture(scope="module")
def house(worker):
    with house_of(worker) as house:
        yield house


@pytest.mark.slow
@pytest.mark.parametrize("is_abrupt", [False, True])
def test_200_clients_that_vanish(house, is_abrupt):
    told_before = house.samples()
    with nothing_left(house), connected(house, 200) as clients:
        for number, client in enumerate(clients):
            client.sendall(request_bytes(LONG | {"stream": number % 2 == 0, "n": 1 + number % 3}))
            if not number:
                assert client.recv(100).startswith(b"HTTP/1.1 200")
        # All but a few wait in the queue, or for a thread that reads them; some may be refused.
        wait_for(lambda: is_full(house.worker.stats()), what=house.worker.stats)
        for client in clients:
            if is_abrupt:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABRUPT)
            client.close()
    told = house.samples() - told_before
    assert told["cancelled"] > told.total() / 2  # the engine did not go on for nobody
    assert told["failed"] == 0


def is_full(stats):
    return stats.queued > 100 and stats.running == MAX_ROWS


def test_who_vanishes_while_waiting_for_a_thread_gives_up_the_place():
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def occupy():
        begun.release()
        return go_on.wait()

    async def stay():
        await asyncio.Event().wait()

    async def vanish():
        return {"type": "http.disconnect"}

    async def build(receive, work):
        http = HttpRequest({"type": "http", "state": {}}, receive)
        return await gateway.build(http, work)

    async def run():
        busy = [asyncio.create_task(build(stay, occupy)) for _ in range(BUILDER_THREADS)]
        for _ in busy:
            assert await asyncio.to_thread(begun.acquire, timeout=300)
        for _ in range(2 * MAX_WAITING):  # none of them is refused
            with pytest.raises(ClientDisconnect):
                await build(vanish, list)
        go_on.set()
        assert await asyncio.gather(*busy) == [True] * BUILDER_THREADS
        assert await build(stay, list) == []

    engine = FakeEngine()
    gateway = Gateway(engine, Settings(), Metrics(engine), None)
    try:
        asyncio.run(asyncio.wait_for(run(), 300))
    finally:
        go_on.set()


def test_half_sent_heads_and_bodies(house):
    whole = request_bytes(LONG)
    with nothing_left(house):
        for end in (1, 20, whole.index(b"\r\n\r\n"), len(whole) - 60, len(whole) - 1):
            for is_abrupt in (False, True):
                with connect(house) as client:
                    client.sendall(whole[:end])
                    time.sleep(0.01)
                    if is_abrupt:
                        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABRUPT)
        with connect(house) as client:  # a chunk that is none, in the midst of a body
            chunked = {"transfer-encoding": "chunked"}
            head = request_bytes(b"", headers=chunked).replace(b"content-length: 0\r\n", b"")
            client.sendall(head + b'5\r\n{"pro\r\nzz\r\n')
            reply = read_all(client)
        assert reply.startswith(b"HTTP/1.1 400 ")
        assert b'"invalid_http"' in reply
        with connect(house) as client:  # what is no request, in the midst of a reply
            client.sendall(request_bytes(LONG | {"stream": True}))
            assert client.recv(100).startswith(b"HTTP/1.1 200")
            client.sendall(b"\x00\x01\r\n\r\n" * 10)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, ABRUPT)


def test_bodies_that_stop_half_way_end_in_time(worker):
    whole = request_bytes(LONG)

    async def see_bytes(house):  # on the loop, so that it comes before the timeout in any case
        while not body_room(house.server.config.app).used:  # noqa: ASYNC110  it tells nobody
            await asyncio.sleep(0)

    with (
        house_of(worker, Hasty, body_timeout_s=0.2) as house,
        nothing_left(house),
        connected(house, 20) as clients,
    ):
        seen = asyncio.run_coroutine_threadsafe(see_bytes(house), house.loop)
        for client in clients:
            client.sendall(whole[:-1])
        seen.result(300)
        for client in clients:
            assert read_all(client).startswith(b"HTTP/1.1 408 ")


def test_a_declared_gigabyte_is_refused_before_it_is_sent(house):
    with nothing_left(house), connect(house) as client:
        client.sendall(request_bytes(b"", headers={"content-length": str(2**30)}))
        reply = read_all(client)
        assert reply.startswith(b"HTTP/1.1 413 ")
        assert b'"body_too_large"' in reply


def test_an_endless_body_is_cut_off(house):
    head = request_bytes(b"", headers={"transfer-encoding": "chunked"})
    chunk = b"10000\r\n" + b" " * 2**16 + b"\r\n"
    num_sent = 0
    with nothing_left(house), connect(house) as client, contextlib.suppress(ConnectionError):
        client.sendall(head.replace(b"content-length: 0\r\n", b""))
        while num_sent < 2**30:
            client.sendall(chunk)
            num_sent += len(chunk)
    assert num_sent < 64 * 2**20  # the limit, and what the system holds in between


def test_bodies_that_are_too_many_together_are_refused(worker):
    text = {"prompt": "a" * 40_000, "max_tokens": 1}
    settings = {"max_body_bytes": 50_000, "max_bodies_bytes": 100_000}
    whole = request_bytes(text)
    with (
        house_of(worker, **settings) as house,
        nothing_left(house),
        connected(house, 2) as clients,
    ):
        for client in clients:
            client.sendall(whole[:-1])
        wait_for(lambda: house.level().body_bytes > 80_000)
        with connect(house) as client:
            client.sendall(whole)
            reply = read_all(client)
        assert reply.startswith(b"HTTP/1.1 429 ")
        assert b"retry-after: 1" in reply


@pytest.mark.slow
@pytest.mark.parametrize("is_stream", [True, False])
def test_who_reads_nothing_holds_no_row_and_no_memory(worker, is_stream):
    body = LONG | {"n": 8, "logprobs": 5, "max_tokens": 120, "stream": is_stream}
    with (
        house_of(worker, Hasty, send_bytes=4096) as house,
        nothing_left(house),
        connected(house, 3, receive_bytes=4096) as clients,
    ):
        num_accepted = worker.num_accepted + 8 * len(clients)
        for client in clients:
            client.sendall(request_bytes(body))
        wait_for(lambda: worker.num_accepted == num_accepted)
        # Nobody reads; a good client is served all the same, when its turn comes.
        good = httpx2.post(f"{house.url}{URL}", json=LONG, headers=AUTH, timeout=300)
        assert good.status_code == 200
        wait_for(house.is_idle)


def trickle(clients, pieces):
    """Send each client's bytes piece by piece, all clients in turn."""
    for parts in zip(*pieces, strict=True):
        for client, part in zip(clients, parts, strict=True):
            client.sendall(part)


def cut(data, num_pieces):
    size = -(-len(data) // num_pieces)
    return [data[size * i : size * (i + 1)] for i in range(num_pieces)]


def read_slowly(clients):
    """What each gets, read in small pieces, all clients in turn, until their replies end."""
    received, open_ones = dict.fromkeys(clients, b""), set(clients)
    while open_ones:
        for client in list(open_ones):
            received[client] += (part := client.recv(700))
            if not part:
                open_ones.discard(client)
    return [received[client] for client in clients]


@pytest.mark.slow
def test_200_slow_clients_of_whom_half_vanish(worker):
    """Heads, bodies and readers that are slow; others are served meanwhile, and so are those.

    Who stays gets the whole reply. Small buffers: each long stream waits for its reader.
    """
    told = {"connection": "close"}
    streamed = LONG | {"max_tokens": 60, "logprobs": 5, "stream": True}
    short = LONG | {"max_tokens": 2}
    with (
        house_of(worker, send_bytes=4096) as house,
        nothing_left(house),
        connected(house, 200, receive_bytes=4096) as clients,
    ):
        senders, readers = clients[:100], clients[100:]
        for client in readers:
            client.sendall(request_bytes(streamed, headers=told))
        half = [cut(request_bytes(short, headers=told), 16) for _ in senders]
        trickle(senders, [parts[:8] for parts in half])
        good = httpx2.post(f"{house.url}{URL}", json=short, headers=AUTH, timeout=300)
        assert good.status_code == 200
        for client in (*senders[::2], *readers[::2]):
            client.close()
        trickle(senders[1::2], [parts[8:] for parts in half[1::2]])
        replies = read_slowly([*senders[1::2], *readers[1::2]])
    assert all(reply.startswith(b"HTTP/1.1 200") for reply in replies)
    assert all(b'"finish_reason":"length"' in reply for reply in replies)
    assert all(b"data: [DONE]" in reply for reply in replies[50:])


def test_more_requests_than_the_queue_holds():
    model, is_refused = tiny_model(), threading.Event()
    step = model.step

    def held_up(tokens, cache):  # until somebody found no place any more
        assert is_refused.wait(300)
        return step(tokens, cache)

    def ask(number):
        body = LONG | {"max_tokens": 20, "stream": number % 2 == 0}
        reply = client.post(URL, json=body)
        if reply.status_code == 429:
            is_refused.set()
        return reply

    model.step = held_up
    is_refused.set()
    with working(model, max_queue=8) as small, house_of(small) as house, nothing_left(house):
        is_refused.clear()
        with (
            httpx2.Client(base_url=house.url, headers=AUTH, timeout=300) as client,
            ThreadPoolExecutor(40) as pool,
        ):
            replies = list(pool.map(ask, range(80)))
        statuses = Counter(reply.status_code for reply in replies)
        assert statuses.keys() == {200, 429}
        assert small.num_accepted == statuses[200] + 1  # and the one that warmed up
        for reply in replies:
            if reply.status_code == 429:
                assert 1 <= int(reply.headers["retry-after"]) <= 60
                assert reply.json()["error"]["code"] == "server_overloaded"
            elif reply.headers["content-type"].startswith("text/event-stream"):
                assert reply.text.endswith("data: [DONE]\n\n")
                assert '"finish_reason":"length"' in reply.text


def breaking(model, error):
    """Let a model make some steps, wait for the first event, and fail until the second is set."""
    step, num_left = model.step, 20
    is_broken, is_mended = threading.Event(), threading.Event()

    def break_off(tokens, cache):
        nonlocal num_left
        num_left -= 1
        if num_left < 0 and not is_mended.is_set():
            assert is_broken.wait(300)
            raise error
        return step(tokens, cache)

    model.step = break_off
    return is_broken, is_mended


@pytest.mark.parametrize("is_device_lost", [False, True])
def test_an_engine_that_fails_in_mid_stream(is_device_lost, caplog):
    model = tiny_model()
    text = "CUDA error: at 0x7f00" if is_device_lost else "at 0x7f00"
    is_broken, is_mended = breaking(model, RuntimeError(text))
    with working(model, max_queue=64) as worker, house_of(worker) as house:
        begun = threading.Semaphore(0)

        def ask(number):
            body = LONG | {"stream": number % 2 == 0}
            url = f"{house.url}{URL}"
            with httpx2.stream("POST", url, json=body, headers=AUTH, timeout=300) as reply:
                begun.release()
                return reply.status_code, reply.read().decode()

        with ThreadPoolExecutor(10) as pool:
            replies = [pool.submit(ask, number) for number in range(10)]
            try:
                assert begun.acquire(timeout=300)
                wait_for(lambda: worker.num_accepted == 10)
            finally:
                is_broken.set()
            replies = [reply.result(300) for reply in replies]
        for number, (status, text) in enumerate(replies):
            check_failure(status, text, is_stream=number % 2 == 0)
        assert house.samples() == {"failed": 10}
        assert "tensor(" not in caplog.text
        is_mended.set()
        after = httpx2.post(f"{house.url}{URL}", json=LONG, headers=AUTH, timeout=300)
        if not is_device_lost:  # that was the end of those requests, not of the engine
            assert after.status_code == 200
            return
        assert (after.status_code, after.json()["error"]["code"]) == (503, "engine_failed")
        assert httpx2.get(f"{house.url}/health/ready", timeout=300).status_code == 503


def check_failure(status, text, *, is_stream):
    """One error, told as the reply was begun, and nothing of the inside."""
    assert "0x7f00" not in text
    if not is_stream:
        assert status == 500
        assert json.loads(text)["error"]["type"] == "server_error"
        return
    assert status == 200
    *_, last, done, end = text.split("\n\n")
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
    assert (done, end) == ("data: [DONE]", "")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 20 MiB, of which an upload must leave 16 free."""
    path = tmp_path / "disk"
    path.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("there is no mount(8) here")
    if done.returncode:
        pytest.skip(f"no small file system can be mounted: {done.stderr.strip()}")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_a_full_disk_refuses_uploads_and_serves_on(worker, small_disk):
    write_files(small_disk / "task" / "1", adapter_files(seed=1))
    big = make_tar(adapter_files(tensor=vectors(180_000), num_virtual_tokens=180_000))
    assert len(big) > 20 * 2**20
    settings = {"adapters": small_disk, "api_key": KEY, "adapter_poll_s": 3600.0}
    with (
        house_of(worker, **settings) as house,
        httpx2.Client(base_url=house.url, headers=AUTH, timeout=300) as client,
    ):
        body = LONG | {"model": "task", "max_tokens": 8, "temperature": 0}
        text = client.post(URL, json=body).json()["choices"][0]["text"]
        used = os.statvfs(small_disk).f_bfree
        for content in (big, iter([big[i : i + 2**20] for i in range(0, len(big), 2**20)])):
            reply = client.put("/admin/adapters/task/2", content=content)
            assert (reply.status_code, reply.json()["error"]["code"]) == (507, "disk_full")
            assert not list(small_disk.glob(f"{PREFIX}*"))
            assert abs(os.statvfs(small_disk).f_bfree - used) <= 2
        after = client.post(URL, json=body)
        assert after.headers["x-adapter"] == "task@1"
        assert after.json()["choices"][0]["text"] == text
        small = client.put("/admin/adapters/task/2", content=make_tar(adapter_files(seed=2)))
        assert small.status_code == 201, small.text
        assert client.post(URL, json=body).headers["x-adapter"] == "task@2"
