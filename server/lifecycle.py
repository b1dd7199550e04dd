"""The server process: a port opened early, a drain at a signal, an exit status that tells."""

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import uvicorn
from starlette.types import ASGIApp

from engine.errors import EngineStopped
from server.connections import PatientProtocol
from server.log_format import say

if TYPE_CHECKING:
    from server.protocol import Engine  # torch comes with it, which takes seconds

logger = logging.getLogger(__name__)

ENDED = ("failed", "stopped")
POLL_S = 0.05
CLOSE_S = 5  # for connections to close after the drain
IDLE_S = 75  # longer than proxies keep idle connections, so that they close first


def open_socket(host: str, port: int) -> socket.socket:
    """Listen on an address; port 0 takes a free one. Raises OSError that says where and why."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from error


class DrainingServer(uvicorn.Server):
    """uvicorn that goes on listening while the engine drains, and stops when the engine has ended.

    Left to itself, uvicorn closes its port before the application hears of the signal, and raises
    the signal again at the end, which looks like a crash. At SIGTERM it listens for at least
    `delay_s`, so that who asks whether it is ready is told, and is not refused the connection; who
    stops it by hand need not wait.
    """

    def __init__(
        self, config: uvicorn.Config, engine: "Engine", drain_s: float, delay_s: float = 0.0
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_s = drain_s
        self._delay_s = delay_s
        self._first_signal = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002  inherited
        """Drain at the first signal, leave at the second."""
        self.force_exit = self.should_exit
        self.should_exit = True
        self._first_signal = self._first_signal or sig

    async def on_tick(self, counter: int) -> bool:
        return await super().on_tick(counter) or self._engine.state in ENDED

    async def main_loop(self) -> None:
        await super().main_loop()
        if self.should_exit:
            await self._drain()

    async def _drain(self) -> None:
        logger.info("draining for up to %.0f s", self._drain_s)
        delay_s = self._delay_s if self._first_signal == signal.SIGTERM else 0.0
        clock = asyncio.get_running_loop().time
        listen_until_s = clock() + delay_s
        # Not a thread of the pool: at the end asyncio waits for those, also when told to hurry.
        drain = threading.Thread(target=self._engine.drain, args=(self._drain_s,), daemon=True)
        drain.start()
        while (  # noqa: ASYNC110  signals set no event
            drain.is_alive() or clock() < listen_until_s
        ) and not self.force_exit:
            await asyncio.sleep(POLL_S)
        if self.force_exit:  # open streams still get their error; nobody waits for the engine
            self._engine.drain(0.0)


def run(
    app: ASGIApp, engine: "Engine", listener: socket.socket, drain_s: float, delay_s: float = 0.0
) -> None:
    """Serve until a signal comes or the engine ends.

    Raises:
        EngineStopped: the engine ended by itself, or a second signal cut the drain short.
    """
    config = uvicorn.Config(
        app,
        http=PatientProtocol,  # of h11, the one parser that limits headers
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=CLOSE_S,
    )
    server = DrainingServer(config, engine, drain_s, delay_s)
    server.run(sockets=[listener])
    if server.force_exit:
        raise EngineStopped("stopped by a second signal before all requests had ended")
    if not server.should_exit:
        raise EngineStopped(f"the engine has ended: {engine.failure or 'see the log'}")


def run_to_exit(
    app: ASGIApp,
    engine: "Engine",
    listener: socket.socket,
    drain_s: float,
    delay_s: float = 0.0,
    close: Callable[[], None] = lambda: None,
) -> None:
    """As `run`, then `close`; a failure, or an engine that still computes, ends the process there.

    Python cannot end under a thread that is inside torch: the process would abort.
    """
    try:
        run(app, engine, listener, drain_s, delay_s)
    except EngineStopped as error:
        close()
        say(logging.CRITICAL, str(error))
        leave(1)
    close()
    if engine.state not in ENDED:
        leave(0)


def leave_on_signals() -> None:
    """Until there is a server to drain, a signal ends the process at once, and well."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: leave(0))


def leave(status: int) -> NoReturn:
    """End the process without ending Python."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(status)
