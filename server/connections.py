"""Connections that do not hang: slow request heads and readers that read nothing are cut off."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 30.0
WRITE_S = 60.0


class PatientProtocol(H11Protocol):
    """uvicorn's protocol for HTTP/1.1 with two more deadlines.

    From its first byte on, the head of a request must come within `HEAD_S`; so must something on a
    fresh connection. A client that reads nothing for `WRITE_S` while a reply waits is gone: its
    request ends as if it had closed the connection. Bodies are the matter of `server.bodies`.
    """

    head_s = HEAD_S
    write_s = WRITE_S

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a first request, but not for ever."""
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        """Read on; the clock runs while the head of a request is not whole."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_head()
        elif self.cycle is None or self.cycle.response_complete:
            self._await_head()

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
