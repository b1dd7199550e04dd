"""Engines behind sockets, their hosts in a thread here or in a process of their own."""

import contextlib
import os
import socket
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from engine.options import EngineOptions
from engine.remote import RemoteEngine
from engine.remote_host import Host, Reporter
from engine.remote_process import EngineProcess, spawn_engine
from engine.remote_wire import make_wires
from engine.worker import LoadedModel, Worker
from tests.tiny import byte_tokenizer, tiny_model
from tests.waiting import wait_for

OPTIONS = EngineOptions(model=Path(), name="tiny")


def load_tiny(_):
    return LoadedModel(tiny_model(), byte_tokenizer())


def is_loaded(engine):
    return engine.state not in ("starting", "loading")


class Threads:
    """Looks like a process; to kill it is to cut its sockets."""

    def __init__(self, *sockets):
        self._sockets = sockets
        self._status = None

    def poll(self):
        return self._status

    def kill(self):
        self._status = 0
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def wait(self, timeout=None):
        self.kill()
        return self._status


def connection(one):
    return Connection(os.dup(one.fileno()))


@contextlib.contextmanager
def hosted(
    load=load_tiny,
    options=OPTIONS,
    up_bytes=None,
    down_bytes=None,
    workers=None,
    until=is_loaded,
    **settings,
):
    """A remote engine and its host, which is here, with a worker that loads so."""
    control, their_control = socket.socketpair()
    wire, their_wire = make_wires()
    for one, most_bytes in ((wire, down_bytes), (their_wire, up_bytes)):
        if most_bytes is not None:
            one.line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, most_bytes)
    child = EngineProcess(Threads(their_control, their_wire.line), connection(control), wire)
    end = connection(their_control)

    def start(deliver):
        worker = Worker("tiny", load, max_queue=10_000, deliver=deliver, **settings)
        if workers is not None:
            workers.append(worker)
        worker.start()
        return worker

    engine = RemoteEngine(child, options)
    engine.start()
    end.recv()  # what a process is told to load
    host = Host(end, their_wire, Reporter(end), start)
    thread = threading.Thread(target=host.run)
    thread.start()
    try:
        wait_for(lambda: until(engine))
        yield engine, host
    finally:
        engine.drain(0.0)
        thread.join(300)
        assert not thread.is_alive()
        host._worker.drain(5.0)
        for one in (control, their_control, their_wire, end):
            one.close()


@contextlib.contextmanager
def spawned(model, **options):
    """A remote engine whose host is a process, ready."""
    engine = RemoteEngine(spawn_engine(), replace(OPTIONS, model=model, **options))
    engine.start()
    try:
        wait_for(lambda: is_loaded(engine))
        yield engine
    finally:
        engine.drain(0.0)
