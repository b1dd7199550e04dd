"""What a gateway and the process of its engine tell each other.

Two sockets join them. Over the one for control go single objects, now and then. Over the one for
requests go frames: a size in four bytes, then a pickle of plain tuples. Both ends are one program
of one version, and nobody else holds a socket; nothing that a client sent is unpickled but as data.
"""

import logging
import pickle
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from engine.adapters import Adapter, Base
from engine.config import ModelConfig
from engine.grammar import Kind
from engine.options import EngineOptions
from engine.planning import MemoryPlan
from engine.request import Event, Piece, Request
from engine.stats import EngineStats
from engine.ticket import Told
from engine.worker import State

SIZE = struct.Struct("!I")
PROTOCOL = 5

# One event of a request, by the number of that. Most are pieces without anything special: as plain
# tuples, 64 of them take 9 us to pack and 8 us to unpack; as they are, 93 and 101.
Entry = tuple[int, str, tuple[int, ...]] | tuple[int, Event]


# --- down: for the engine, in frames


@dataclass(frozen=True, slots=True)
class Submit:
    """A request to be carried out, without what it shares with others.

    `adapter` is the number of one that was lent, `grammar` the kind and text of one to compile.
    """

    number: int
    request: Request
    adapter: int | None = None
    grammar: tuple[Kind, str] | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Nobody reads the events of a request any more."""

    number: int


@dataclass(frozen=True, slots=True)
class Lend:
    """An adapter that requests to come may have, until it is taken back."""

    number: int
    adapter: Adapter


@dataclass(frozen=True, slots=True)
class TakeBack:
    """An adapter that no request will ask for again."""

    number: int


Order = Submit | Cancel | Lend | TakeBack


# --- up: what a turn of the engine came to, in a frame


@dataclass(frozen=True, slots=True)
class Turn:
    """Events in their order, numbers of requests that do not wait any more, and that are closed."""

    entries: list[Entry]
    begun: list[int]
    closed: list[int]


# --- control


@dataclass(frozen=True, slots=True)
class Opening:
    """The first message: what to load, and from what level on to log."""

    options: EngineOptions
    log_level: int


@dataclass(frozen=True, slots=True)
class Ask:
    """To be answered by a Status."""


@dataclass(frozen=True, slots=True)
class Drain:
    """See `Worker.drain`; to be answered by Drained, when it is over."""

    timeout_s: float


@dataclass(frozen=True, slots=True)
class Status:
    """What the worker is at. `num_answered` questions came before it."""

    state: State
    phase: str
    failure: str | None
    read_bytes: int
    total_bytes: int
    fallbacks: tuple[str, ...]
    stats: EngineStats
    num_answered: int = 0


@dataclass(frozen=True, slots=True)
class Facts:
    """What does not change any more, once the model is loaded."""

    config: ModelConfig
    base: Base
    plan: MemoryPlan | None
    cache_bytes: int | None


@dataclass(frozen=True, slots=True)
class Drained:
    """Whether all that was accepted came to its end."""

    is_done: bool


@dataclass(frozen=True, slots=True)
class Logged:
    """A log record, and the traceback that belongs to it."""

    record: logging.LogRecord
    trace: str | None


News = Status | Facts | Drained | Logged


def pack(message: object) -> bytes:
    """A frame with a message in it."""
    body = pickle.dumps(message, PROTOCOL)
    return SIZE.pack(len(body)) + body


def pack_turn(turn: Turn) -> bytes:
    """A frame with what a turn came to."""
    return pack((turn.entries, turn.begun, turn.closed))


def make_entry(number: int, event: Event) -> Entry:
    """An event for a frame."""
    if type(event) is Piece and not event.blank and not event.logprobs:
        return number, event.text, event.token_ids
    return number, event


def event_of(entry: Entry) -> Event:
    """The event that an entry was made of."""
    return Piece(entry[1], entry[2]) if len(entry) == 3 else entry[1]


class Unpacker:
    """Cuts what comes out of a socket into the messages of frames."""

    def __init__(self) -> None:
        self._held = bytearray()

    def push(self, data: bytes) -> Iterator[object]:
        """Messages that are whole now, in their order."""
        held = self._held
        held += data
        begin = 0
        while len(held) - begin >= SIZE.size:
            (size,) = SIZE.unpack_from(held, begin)
            end = begin + SIZE.size + size
            if len(held) < end:
                break
            yield pickle.loads(memoryview(held)[begin + SIZE.size : end])  # noqa: S301  of our own process
            begin = end
        del held[:begin]


def entries_of(told: Told) -> list[Entry]:
    """All events of a turn for a frame."""
    return [make_entry(ticket.number, event) for ticket, event in told]
