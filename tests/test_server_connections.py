"""Connections that send half a head or read nothing end; those that are merely slow do not."""

import asyncio
import contextlib
import gc
import json
import re
import socket
import threading
import time
import weakref

import pytest
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from server.connections import MOST_HELD_BYTES, CorkedTransport, PatientProtocol
from server.lifecycle import open_socket
from tests.waiting import wait_for

REQUEST = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"


BOUND_S = 1.5  # in which a test gets to send what it has to send


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


class HastyHeads(PatientProtocol):
    head_s = BOUND_S


class HastyReaders(PatientProtocol):
    write_s = BOUND_S


@contextlib.contextmanager
def serving(app, protocol=HastyHeads):
    listener = open_socket("127.0.0.1", 0)
    config = uvicorn.Config(app, http=protocol, lifespan="off", ws="none", log_config=None)
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
    with socket.create_connection(address, timeout=300) as client:
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
        assert is_closed(client)


def test_bytes_that_trickle_in_gain_no_time():
    with serving(Flood(is_endless=False)) as address, connection(address) as client:
        end_s = time.monotonic() + 300
        with contextlib.suppress(OSError):
            while time.monotonic() < end_s:
                client.sendall(b"G")
                threading.Event().wait(BOUND_S / 10)
        assert time.monotonic() < end_s


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
        for wait_s in (0, 1.5 * BOUND_S):
            threading.Event().wait(wait_s)
            client.sendall(REQUEST)
            received = b""
            while not received.endswith(b"0\r\n\r\n"):
                part = client.recv(1000)
                assert part
                received += part


def test_a_reader_that_reads_nothing_is_gone():
    app = Flood(is_endless=True)
    with serving(app, HastyReaders) as address, connection(address) as client:
        client.sendall(REQUEST)
        assert app.gone.wait(300)


def test_what_waits_for_a_reader_is_bounded():
    transports, sizes = [], []

    class Noted(HastyReaders):
        def connection_made(self, transport):
            super().connection_made(transport)
            transports.append(transport)

    class Measured(Flood):
        async def __call__(self, scope, receive, send):
            async def measured(message):
                await send(message)
                sizes.append(transports[0].get_write_buffer_size())

            await super().__call__(scope, receive, measured)

    app = Measured(is_endless=True)
    with serving(app, Noted) as address, connection(address) as client:
        client.sendall(REQUEST)
        assert app.gone.wait(300)
    limit = 65_536  # from which on a transport asks for patience
    assert limit < max(sizes) < limit + 65_536 + 100  # and one piece


def test_a_reader_that_reads_slowly_is_not():
    app = Flood(is_endless=True)
    with serving(app, HastyReaders) as address, connection(address) as client:
        client.sendall(REQUEST)
        end_s = time.monotonic() + 2 * BOUND_S
        while time.monotonic() < end_s:
            assert client.recv(2**20)
            threading.Event().wait(0.01)
        assert not app.gone.is_set()
    assert app.gone.wait(300)


class Speaker:
    """Sends some pieces, with or without telling their length before."""

    pieces = (b"one", b"", b"two\r\n0\r\n\r\n", b"x" * 70_000)

    def __init__(self, *, has_length):
        size = b"%d" % sum(map(len, self.pieces))
        self.headers = [(b"Content-Length", size)] if has_length else []

    async def __call__(self, scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": self.headers})
        for piece in self.pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body"})


@pytest.mark.parametrize("has_length", [False, True])
@pytest.mark.parametrize("start", [b"GET / HTTP/1.1", b"GET / HTTP/1.0", b"HEAD / HTTP/1.1"])
def test_streams_are_sent_byte_by_byte_as_the_parser_would(start, has_length):
    replies = []
    for protocol in (PatientProtocol, H11Protocol):
        app = Speaker(has_length=has_length)
        with serving(app, protocol) as address, connection(address) as client:
            client.sendall(start + b"\r\nhost: a\r\nconnection: close\r\n\r\n")
            received = b""
            while part := client.recv(2**20):
                received += part
        head, _, body = received.partition(b"\r\n\r\n")
        lines = [line for line in head.split(b"\r\n") if not line.startswith(b"date:")]
        replies.append((lines, body))
    assert replies[0] == replies[1]
    assert bool(replies[0][1]) == start.startswith(b"GET")


class Written(asyncio.Transport):
    """Notes what is written, and whether it is closed."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, data):
        self.pieces.append(bytes(data))

    def close(self):
        self.pieces.append("closed")

    def abort(self):
        self.pieces.append("aborted")


def written(use):
    """What a transport is given that is corked and used in one turn of the loop, and later."""

    async def run():
        transport = Written()
        corked = CorkedTransport(transport, asyncio.get_running_loop())
        use(corked)
        before = list(transport.pieces)
        await asyncio.sleep(0)
        return before, transport.pieces[len(before) :]

    return asyncio.run(run())


def write_all(corked, *pieces):
    for piece in pieces:
        corked.write(piece)


def test_what_is_written_in_a_turn_goes_out_in_one_piece():
    assert written(lambda corked: write_all(corked, b"head", b"", b"body")) == ([], [b"headbody"])
    assert written(lambda corked: write_all(corked, b"")) == ([], [])


def test_much_goes_out_at_once():
    much = b"x" * (MOST_HELD_BYTES + 1)
    told = written(lambda corked: write_all(corked, b"a", much, b"b"))
    assert told == ([b"a" + much], [b"b"])


def test_flushed_and_closed_are_after_what_was_written_and_aborted_is_without_it():
    def use(end):
        def used(corked):
            corked.write(b"a")
            end(corked)

        return used

    assert written(use(CorkedTransport.flush)) == ([b"a"], [])
    assert written(use(CorkedTransport.close)) == ([b"a", "closed"], [])
    assert written(use(CorkedTransport.abort)) == (["aborted"], [])


def test_no_piece_waits_for_the_one_before_to_be_acknowledged():
    found = []

    class Seen(PatientProtocol):
        def connection_made(self, transport):
            super().connection_made(transport)
            raw = transport.get_extra_info("socket")
            found.append(raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

    with serving(Flood(is_endless=False), Seen) as address, connection(address) as client:
        client.sendall(REQUEST)
        assert client.recv(1000)
    assert found == [1]


def test_what_was_written_before_a_client_closed_its_side_is_sent():
    """The transport then closes itself, and not what is corked around it."""

    class Late(PatientProtocol):
        def eof_received(self):
            self.transport.write(b"5\r\nmeant\r\n")  # as a task does in this turn, just before
            super().eof_received()

    async def begin(scope, receive, send):
        await receive()
        await send(START)
        await send(PIECE)
        await receive()  # until the client is gone

    with serving(begin, Late) as address, connection(address) as client:
        client.sendall(REQUEST)
        received = client.recv(1000)
        client.shutdown(socket.SHUT_WR)
        while part := client.recv(1000):
            received += part
    assert b"5\r\nmeant\r\n" in received


def test_what_is_written_before_a_silence_is_there_during_it():
    """On one connection: leave to send a body, a first piece, and all again after a reply."""
    go_on = threading.Event()

    async def speak(scope, receive, send):
        assert (await receive())["body"] == b"question"
        await send(START)
        await send(PIECE)
        while not go_on.is_set():  # noqa: ASYNC110  another thread sets it
            await asyncio.sleep(0.01)
        go_on.clear()
        await send(PIECE)
        await send(END)

    def read_to(client, end):
        received = b""
        while not received.endswith(end):
            part = client.recv(1000)
            assert part, received
            received += part
        return received

    head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 8\r\nexpect: 100-continue\r\n\r\n"
    with serving(speak) as address, connection(address) as client:
        for _ in range(2):
            client.sendall(head)
            assert read_to(client, b"\r\n\r\n").startswith(b"HTTP/1.1 100 ")
            client.sendall(b"question")
            assert read_to(client, b"\r\n5\r\npiece\r\n").startswith(b"HTTP/1.1 200 ")
            go_on.set()
            assert read_to(client, b"0\r\n\r\n") == b"5\r\npiece\r\n3\r\nend\r\n0\r\n\r\n"


def test_a_piece_waits_for_nothing_else_that_is_done_in_its_turn():
    has_come, told = threading.Event(), []

    async def speak(scope, receive, send):
        await send(START)
        for _ in range(2):
            await send(PIECE)
            told.append(has_come.wait(20))  # no other task runs meanwhile
            has_come.clear()
        await send(END)

    with serving(speak) as address, connection(address) as client:
        client.sendall(REQUEST)
        for _ in range(2):
            received = b""
            while not received.endswith(b"5\r\npiece\r\n"):
                received += client.recv(1000)
            has_come.set()
        assert client.recv(1000)
    assert told == [True, True]


def test_a_socket_of_the_file_system_serves_too(tmp_path, caplog):
    """It has no options of TCP."""
    config = uvicorn.Config(
        Flood(is_endless=False), http=PatientProtocol, lifespan="off", ws="none", log_config=None
    )
    server = uvicorn.Server(config)
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            client.settimeout(300)
            client.connect(path)
            client.sendall(REQUEST)
            assert client.recv(1000).startswith(b"HTTP/1.1 200 ")
        finally:
            server.should_exit = True
            thread.join()
    assert not caplog.records


START = {"type": "http.response.start", "status": 200, "headers": []}
PIECE = {"type": "http.response.body", "body": b"piece", "more_body": True}
END = {"type": "http.response.body", "body": b"end"}
SLIPS = {
    "none": [START, PIECE, END],
    "a-piece-after-the-end": [START, PIECE, END, PIECE],
    "two-ends": [START, PIECE, END, END],
    "two-heads": [START, PIECE, START, END],
    "no-end": [START, PIECE],
    "a-message-of-another-kind": [START, PIECE, {**PIECE, "type": "http.response.other"}, END],
    "no-body-allowed": [{**START, "status": 204}, END],
    "of-another-status": [{**START, "status": 404}, PIECE, END],
    "with-a-goodbye": [{**START, "headers": [(b"Connection", b"close")]}, PIECE, END],
    "chunked-by-name": [{**START, "headers": [(b"Transfer-Encoding", b"chunked")]}, PIECE, END],
}


async def slip(scope, receive, send):
    """Send what the path names, right or wrong."""
    for message in SLIPS[scope["path"][1:]]:
        await send(message)


def test_after_any_slip_the_next_request_fares_as_with_the_parser():
    head = "{} /{} HTTP/1.{}\r\nhost: a\r\nconnection: {}\r\n\r\n"
    heads = [(method, minor) for method in ("GET", "HEAD") for minor in (0, 1)]
    keeps = ("keep-alive", "close")
    asked = [(*one, name, keep) for one in heads for name in SLIPS for keep in keeps]
    told = []
    for protocol in (PatientProtocol, H11Protocol):
        with serving(slip, protocol) as address:
            for method, minor, name, keep in asked:
                with connection(address) as client:
                    first = head.format(method, name, minor, keep)
                    client.sendall((first + head.format("GET", "none", 1, "close")).encode())
                    received = b""
                    with contextlib.suppress(ConnectionResetError):
                        while part := client.recv(2**20):
                            received += part
                told.append(re.sub(rb"date: [^\r]*\r\n", b"", received))
    for one, ours, theirs in zip(asked, told[: len(asked)], told[len(asked) :], strict=True):
        assert ours == theirs, one
    assert any(one.count(b"HTTP/1.1 200") == 2 for one in told)  # some went on


def test_a_connection_that_is_closed_is_forgotten_at_once():
    known = []

    class Known(PatientProtocol):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            known.append(weakref.ref(self))

    gc.disable()
    try:
        with serving(Flood(is_endless=False), Known) as address:
            for _ in range(3):
                with connection(address) as client:
                    client.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
                    while client.recv(1000):
                        pass
            wait_for(lambda: not any(one() for one in known))
    finally:
        gc.enable()
    assert len(known) == 3
