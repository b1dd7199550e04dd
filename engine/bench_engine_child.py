"""A contender of `infmoe bench-engine` in a process of its own, seen from the one that asks.

The threads of one (each brings its own OpenMP, whose threads stay) would slow all others down in a
process that they share.
"""

import multiprocessing
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch

from engine.bench import decoder_bytes
from engine.bench_engine_adapters import measure_adapters
from engine.bench_engine_contenders import (
    KINDS,
    Answer,
    Contender,
    OurRunner,
    Text,
    serve_static,
)
from engine.errors import EngineError


class Start(NamedTuple):
    """Which contender to load, from where, and how many threads it may use."""

    name: str
    directory: Path
    threads: int


class Loaded(NamedTuple):
    """That it is loaded; of ours the bytes of weights that a decoded token meets, else 0."""

    decoder_bytes: int


class Order(NamedTuple):
    """Texts to answer: together, or in static batches of so many rows as they arrive.

    With `adapter_repeats` it is measured so often what adapters cost ours.
    """

    texts: Sequence[Text]
    static_rows: int = 0
    adapter_repeats: int = 0


Reply = Loaded | list[Answer] | dict[str, object]


class Child:
    """A loaded contender."""

    def __init__(self, name: str, connection: Connection) -> None:
        self.name = name
        self._connection = connection
        self.loaded: Loaded | None = None

    def load(self, start: Start) -> None:
        """Load it. Raises EngineError if that fails, as each of the others does."""
        loaded = self._ask(start)
        assert isinstance(loaded, Loaded)
        self.loaded = loaded

    def generate(self, texts: Sequence[Text], static_rows: int = 0) -> list[Answer]:
        """Answer texts, as an order says."""
        answers = self._ask(Order(texts, static_rows))
        assert isinstance(answers, list)
        return answers

    def measure_adapters(self, texts: Sequence[Text], repeats: int) -> dict[str, object]:
        """What `measure_adapters` finds for ours."""
        found = self._ask(Order(texts, adapter_repeats=repeats))
        assert isinstance(found, dict)
        return found

    def _ask(self, message: Start | Order) -> Reply:
        try:
            self._connection.send(message)
            reply: Reply | str = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            raise EngineError(f"{self.name}: its process ended; out of memory perhaps") from error
        if isinstance(reply, str):
            raise EngineError(f"{self.name}: {reply}")
        return reply


@contextmanager
def open_child(start: Start) -> Iterator[Child]:
    """Start a process that loads a contender; it is gone afterwards."""
    context = multiprocessing.get_context("spawn")
    with ExitStack() as stack:
        ours, theirs = context.Pipe()
        process = context.Process(target=serve, args=(theirs,), daemon=True)
        process.start()
        stack.callback(process.join)
        stack.callback(process.kill)
        stack.enter_context(ours)
        theirs.close()
        child = Child(start.name, ours)
        child.load(start)
        yield child


def serve(connection: Connection) -> None:
    """Load the contender that is named first, then carry out orders until the pipe is closed.

    What fails is told as a text, and ends it.
    """
    with connection, suppress(EOFError):
        start: Start = connection.recv()
        torch.set_num_threads(start.threads)
        try:
            kind = KINDS[start.name]
            contender = kind.open(start.directory, kind.dtype)
            weights = decoder_bytes(contender.model) if isinstance(contender, OurRunner) else 0
            connection.send(Loaded(weights))
            while True:
                connection.send(carry_out(contender, connection.recv()))
        except (EngineError, OSError, ValueError, RuntimeError) as error:
            connection.send(str(error))


def carry_out(contender: Contender, order: Order) -> list[Answer] | dict[str, object]:
    """Answer texts or measure adapters; ours answers each text as it arrives."""
    if isinstance(contender, OurRunner):
        if order.adapter_repeats:
            return measure_adapters(contender.model, order.texts, order.adapter_repeats)
        return contender.generate(order.texts)
    if order.static_rows:
        return serve_static(contender, order.texts, order.static_rows)
    return contender.generate(order.texts)
