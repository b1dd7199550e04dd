"""Starting the process of an engine, and waiting for its end. Imports nothing that takes long."""

import os
import signal
import socket
import subprocess
import sys
import threading
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

from engine.remote_wire import Wire, make_wires

REAP_S = 5.0


@dataclass(frozen=True, slots=True)
class EngineProcess:
    """A process that waits to be told what to load, and the two ways to it."""

    process: "subprocess.Popen[bytes]"
    control: Connection
    wire: Wire

    def end(self) -> str:
        """Kill it if it has not ended; what became of it in a few words."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(REAP_S)
        return self.kill()

    def kill(self) -> str:
        """The same without waiting for its own end."""
        if self.process.poll() is None:
            self.process.kill()
        return tell_status(self.process.wait())


def tell_status(status: int) -> str:
    """What ended a process."""
    if status >= 0:
        return f"it ended with status {status}"
    name = signal.Signals(-status).name
    more = ", which the system sends when memory runs out" if -status == signal.SIGKILL else ""
    return f"it was ended by {name}{more}"


def spawn_engine() -> EngineProcess:
    """Start the process of an engine; it begins to import what it needs.

    Where the main thread starts it, it is killed with this process, however that ends.
    """
    control, their_control = socket.socketpair()
    wire, theirs = make_wires()
    with their_control, closing(theirs):
        numbers = [their_control.fileno(), theirs.line.fileno(), theirs.rung, theirs.bell]
        arguments = list(map(str, numbers))
        if threading.current_thread() is threading.main_thread():
            arguments.append(str(os.getpid()))
        process = subprocess.Popen(
            [sys.executable, "-m", "engine.remote_host", *arguments],
            stdin=subprocess.DEVNULL,
            pass_fds=numbers,
            env=_environment(),
        )
    return EngineProcess(process, Connection(control.detach()), wire)


def _environment() -> dict[str, str]:
    """Ours, in which this very package is found."""
    paths = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
