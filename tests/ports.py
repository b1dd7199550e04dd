"""A port for a program that has to be told one."""

import contextlib
import random
import socket


def free_port() -> int:
    """A port that nobody listens at, of those that the system gives to no connection meanwhile."""
    for port in random.SystemRandom().sample(range(12_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")
