"""A socket between two processes, with bells for who waits: it wakes them where they can run.

Linux takes who wakes somebody by a socket for about to sleep, and may let the other run on the same
core. Here neither sleeps: the engine goes on to its next step, the gateway to the next request.
Measured on two cores: in every other run the gateway stood still for 4 to 5 ms after each request
that it sent. With an eventfd it never did, and 64 streams of the demo ran a tenth faster.
"""

import os
import socket
from contextlib import suppress
from dataclasses import dataclass

READ_BYTES = 2**18


@dataclass(frozen=True, slots=True)
class Wire:
    """One end: nobody waits for data of the socket, but for `rung`, which the other end rings."""

    line: socket.socket
    rung: int
    bell: int

    def send(self, data: bytes | bytearray) -> int:
        """Send what there is room for. Raises BlockingIOError without any, OSError at the end."""
        num_sent = self.line.send(data, socket.MSG_DONTWAIT)
        os.eventfd_write(self.bell, 1)
        return num_sent

    def read(self) -> bytes | None:
        """What has come; None if nothing has. Nothing at all, b"", is the end."""
        try:
            return self.line.recv(READ_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def wait(self) -> None:
        """Wait until the other end has rung; where waiting is done by others, only note that."""
        with suppress(BlockingIOError):
            os.eventfd_read(self.rung)

    def ring_here(self) -> None:
        """Wake who waits at this end."""
        os.eventfd_write(self.rung, 1)

    def close(self) -> None:
        """Close this end."""
        self.line.close()
        os.close(self.rung)
        os.close(self.bell)


def make_wires() -> tuple[Wire, Wire]:
    """Two ends: one for an event loop, one for a thread that waits."""
    line, their_line = socket.socketpair()
    rung, their_rung = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC), os.eventfd(0)
    theirs = Wire(their_line, their_rung, os.dup(rung))
    return Wire(line, rung, os.dup(their_rung)), theirs
