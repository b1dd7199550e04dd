"""Connections that send half a head or read nothing end; those that are merely slow do not."""

import asyncio
import contextlib
import json
import socket
import threading
import time

import pytest
import uvicorn

from server.connections import PatientProtocol
from server.lifecycle import open_socket

REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


class Hasty(PatientProtocol):
    head_s = 0.3
    write_s = 0.3


class Flood:
    """Sends a few bytes, or without end, and notes when a client is gone."""

    def __init__(self, *, is_endless):
        self.is_endless = is_endless
        self.gone = threading.Event()

    async def __call__(self, scope, receive, send):
        await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        gone = asyncio.create_task(receive())
        while self.is_endless and not gone.done():
            await send({"type": "http.response.body", "body": b"x" * 65_536, "more_body": True})
            await asyncio.sleep(0)
        if self.is_endless:
            self.gone.set()
            return
        gone.cancel()
        await send({"type": "http.response.body", "body": b"x", "more_body": False})


@contextlib.contextmanager
def serving(app):
    listener = open_socket("127.0.0.1", 0)
    config = uvicorn.Config(app, http=Hasty, lifespan="off", ws="none", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def connection(address):
    with socket.create_connection(address, timeout=10) as client:
        yield client


def is_closed(client):
    try:
        return client.recv(1000) == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("start", [b"", b"GET", REQUEST[:-2]])
def test_half_a_head_ends_the_connection(start):
    with serving(Flood(is_endless=False)) as address, connection(address) as client:
        client.sendall(start)
        start_s = time.monotonic()
        assert is_closed(client)
        assert time.monotonic() - start_s < 5


def test_bytes_that_trickle_in_gain_no_time():
    with serving(Flood(is_endless=False)) as address, connection(address) as client:
        start_s = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start_s < 5:
                client.sendall(b"G")
                threading.Event().wait(0.05)
        assert time.monotonic() - start_s < 5


def test_half_a_second_head_ends_the_connection():
    with serving(Flood(is_endless=False)) as address, connection(address) as client:
        client.sendall(REQUEST)
        assert client.recv(1000).startswith(b"HTTP/1.1 200")
        client.sendall(REQUEST[:5])
        with contextlib.suppress(ConnectionResetError):
            while client.recv(1000):  # the rest of the first reply
                pass


def test_what_is_no_http_is_told_so_like_every_mistake():
    with serving(Flood(is_endless=False)) as address, connection(address) as client:
        client.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        received = b""
        while part := client.recv(1000):
            received += part
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    assert b"x-content-type-options: nosniff" in head.lower()
    error = json.loads(body)["error"]
    assert (sorted(error), error["code"]) == (["code", "message", "param", "type"], "invalid_http")


def test_a_connection_may_be_idle_between_requests():
    with serving(Flood(is_endless=False)) as address, connection(address) as client:
        for _ in range(2):
            client.sendall(REQUEST)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                received += client.recv(1000)
            threading.Event().wait(2 * Hasty.head_s)


def test_a_reader_that_reads_nothing_is_gone():
    app = Flood(is_endless=True)
    with serving(app) as address, connection(address) as client:
        client.sendall(REQUEST)
        assert app.gone.wait(10)


def test_a_reader_that_reads_slowly_is_not():
    app = Flood(is_endless=True)
    with serving(app) as address, connection(address) as client:
        client.sendall(REQUEST)
        end_s = time.monotonic() + 3 * Hasty.write_s
        while time.monotonic() < end_s:
            assert client.recv(2**20)
            threading.Event().wait(0.005)
        assert not app.gone.is_set()
    assert app.gone.wait(10)
