"""The engine's end of the way of events: it waits for no reader, until too much has piled up."""

import select
import threading
from collections import deque

from engine.remote_wire import Wire

MOST_BYTES = 64 * 2**20  # some 500,000 tokens; the gateway has then not read for minutes


class Outbox:
    """Sends frames at once where the socket has room; else a thread of its own sends them later.

    `send` waits only while more than `most_bytes` are held: nobody reads any row then, and there
    is no use in going on. When the reader is gone all is dropped.
    """

    def __init__(self, wire: Wire, most_bytes: int = MOST_BYTES) -> None:
        self._wire = wire
        self._most_bytes = most_bytes
        self._held: deque[bytes] = deque()
        self._held_bytes = 0
        self._changed = threading.Condition()
        self._is_broken = False
        thread = threading.Thread(target=self._send_held, name="engine-outbox", daemon=True)
        thread.start()

    @property
    def held_bytes(self) -> int:
        """What the socket had no room for."""
        return self._held_bytes

    def send(self, frame: bytes) -> None:
        """Send a frame after those before it."""
        with self._changed:
            self._changed.wait_for(lambda: self._held_bytes <= self._most_bytes or self._is_broken)
            if self._is_broken:
                return
            if not self._held:
                frame = self._send_some(frame)
            if frame and not self._is_broken:
                self._held.append(frame)
                self._held_bytes += len(frame)
                self._changed.notify_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all is sent, or nobody reads; False if time ran out."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._held or self._is_broken, timeout_s)

    def _send_held(self) -> None:
        room = select.poll()
        room.register(self._wire.line, select.POLLOUT)
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._held or self._is_broken)
                if self._is_broken:
                    return
            room.poll()
            with self._changed:
                if self._is_broken:
                    return
                frame = self._held.popleft()
                self._held_bytes -= len(frame)
                if rest := self._send_some(frame):
                    self._held.appendleft(rest)
                    self._held_bytes += len(rest)
                self._changed.notify_all()

    def _send_some(self, frame: bytes) -> bytes:
        """Send as much as there is room for; returns the rest."""
        try:
            return frame[self._wire.send(frame) :]
        except BlockingIOError:
            return frame
        except OSError:
            self._break()
            return b""

    def _break(self) -> None:
        self._is_broken = True
        self._held.clear()
        self._held_bytes = 0
        self._changed.notify_all()
