"""Connections that do not hang: slow request heads and readers that read nothing are cut off."""

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from server.errors import ApiError
from server.safe_headers import SAFE_HEADERS

HEAD_S = 30.0
WRITE_S = 60.0
MOST_HELD_BYTES = 2**14


class ChunkSender:
    """Sends the messages of a reply; the pieces of a stream are written without the parser's help.

    To h11 each piece is an event for its state machine and a list of bytes to join, which takes as
    long as all else that is done for a token. With a piece goes what was held before, the head: one
    that waited would wait for all other streams that have a token in this turn of the event loop.
    """

    def __init__(
        self, cycle: RequestResponseCycle, scope: Scope, send: Send, flush: Callable[[], None]
    ) -> None:
        self._cycle = cycle
        self._send = send
        self._flush = flush
        self._may_chunk = scope["http_version"] == "1.1" and scope["method"] != "HEAD"
        self._is_chunked = False

    async def __call__(self, message: Message) -> None:
        is_piece = message["type"] == "http.response.body" and message.get("more_body", False)
        if not self._is_chunked or not is_piece:
            await self._send(message)
            # After the end as well, what comes is for the parser to refuse: the connection may be
            # another reply's by then.
            self._is_chunked = self._begins_chunks(message)
            return
        cycle, body = self._cycle, message.get("body", b"")
        if cycle.flow.write_paused and not cycle.disconnected:
            await cycle.flow.drain()
        if body and not cycle.disconnected:
            cycle.transport.write(b"%x\r\n%b\r\n" % (len(body), body))
            self._flush()

    def _begins_chunks(self, message: Message) -> bool:
        if not self._may_chunk or message["type"] != "http.response.start":
            return False
        names = {name.lower() for name, _ in message.get("headers", ())}
        return message["status"] == 200 and b"content-length" not in names  # as h11 has it


class CorkedTransport(asyncio.Transport):
    """Sends what is written in one turn of the event loop in one piece, as far as it is small.

    A reply is written in three parts, its head, its body and its end. Each for itself costs a
    system call, and wakes a client that cannot do anything with it yet. At its end a reply is
    flushed, so that its client need not wait for what is done afterwards.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__()
        self._transport = transport
        self._loop = loop
        self._held = bytearray()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Send something soon; at once where much has come together, so that it is paused."""
        if not self._held and data:
            self._loop.call_soon(self.flush)
        self._held += data
        if len(self._held) > MOST_HELD_BYTES:
            self.flush()

    def flush(self) -> None:
        """Send what is held."""
        if self._held:
            held, self._held = self._held, bytearray()
            self._transport.write(held)

    def close(self) -> None:
        """Close when all is sent."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close at once."""
        self._held.clear()
        self._transport.abort()

    def is_closing(self) -> bool:
        """Whether it is being closed."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """What is known of the connection."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """Let the client wait."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self._transport.resume_reading()


class PatientProtocol(H11Protocol):
    """uvicorn's protocol for HTTP/1.1 with two more deadlines.

    From its first byte on, the head of a request must come within `HEAD_S`; so must something on a
    fresh connection. A client that reads nothing for `WRITE_S` while a reply waits is gone: its
    request ends as if it had closed the connection. Bodies are the matter of `server.bodies`.
    What is no HTTP at all is told so like every other mistake.
    """

    head_s = HEAD_S
    write_s = WRITE_S

    _corked: CorkedTransport
    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self._served = self.app
        self.app = self._serve

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; pieces of a stream go out by a shorter way."""
        sender = ChunkSender(self.cycle, scope, send, self._corked.flush)
        await self._served(scope, receive, sender)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request, but not for ever."""
        self._corked = CorkedTransport(transport, self.loop)
        super().connection_made(self._corked)
        self._await_head()
        # What is left of a reply when it has ended is the system's: it too must not wait for ever,
        # and a machine that is gone without a word acknowledges nothing.
        raw = transport.get_extra_info("socket")
        if raw is None or raw.family not in (socket.AF_INET, socket.AF_INET6):
            return
        # asyncio does so itself, but not where the listening socket was made by others. Without it
        # each piece but the first waits until the client has acknowledged the one before: 40 ms.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if hasattr(socket, "TCP_USER_TIMEOUT"):
            wait_ms = int(self.write_s * 1000)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, wait_ms)

    def data_received(self, data: bytes) -> None:
        """Read on; the clock runs while the head of a request is not whole."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_head()
        elif self.cycle is None or self.cycle.response_complete:
            self._await_head()

    def eof_received(self) -> None:
        """The client sends no more: the transport closes itself, after what was written before."""
        self._corked.flush()
        super().eof_received()

    def on_response_complete(self) -> None:
        """The last piece of a reply is written: it goes out before the next request is read."""
        self._corked.flush()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no request, in the shape of all errors, and hang up."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):  # in the midst of a reply
            self.transport.close()
            return
        problem = ApiError(400, f"{msg} The server speaks HTTP/1.1", code="invalid_http")
        body = json.dumps(problem.body()).encode()
        facts = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
        }
        headers = [
            (name.encode(), value.encode()) for name, value in {**facts, **SAFE_HEADERS}.items()
        ]
        head = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (head, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def pause_writing(self) -> None:
        """The client reads more slowly than the reply comes."""
        super().pause_writing()
        self._stop_write()
        self._write_timer = self.loop.call_later(self.write_s, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read."""
        self._stop_write()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing to wait for any more."""
        self._stop_head()
        self._stop_write()
        super().connection_lost(exc)
        self.app = self._served  # else it would hold itself, until garbage is looked for

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(self.head_s, self.transport.abort)

    def _stop_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None
