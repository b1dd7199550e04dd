"""A CUDA driver on the CPU that is as early and as late as the rules of streams and events allow.

What is put on a stream runs in order, but no sooner than the fake's whim has it or something that
must wait for it asks. A copy spoils its slot when it begins and brings the bytes when it ends.

Besides, every access to a slot or a host buffer carries a vector clock, so that two accesses which
nothing orders are found even if they happen to run in a harmless order.
"""

import ctypes
import itertools
import random
import threading
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from offload.transfer import PinningRefused

POISON = 0xEE
COMPUTE = 0  # the default stream has the handle 0

Clock = dict[int, int]  # stream -> how many of its steps are known to be over


@dataclass(eq=False)
class Step:
    """Something on a stream, the step of another stream that it waits for, and what it knows."""

    stream: int
    run: Callable[[], None]
    after: "Step | None" = None
    is_done: bool = False
    clock: Clock = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Access:
    """A step that reads or writes memory."""

    step: Step
    begin: int
    end: int
    is_write: bool


def join(clock: Clock, other: Clock) -> None:
    for stream, position in other.items():
        clock[stream] = max(clock.get(stream, 0), position)


def knows(clock: Clock, step: Step) -> bool:
    return clock.get(step.stream, 0) >= step.clock[step.stream]


class FakeDriver:
    """Streams that lag; `haste` 0 runs only what must run, near 1 nearly everything at once.

    `eager` runs everything at once, for computations that do not go through `launch`. Registering
    is refused where `refuse` says so of the number of bytes.
    """

    def __init__(self, haste=0.0, seed=0, *, eager=False, refuse=lambda size: False, total=10**9):
        self.haste, self.eager, self.refuse, self.total = haste, eager, refuse, total
        self.whims = random.Random(seed)
        self.stream = COMPUTE  # torch's current one
        self.violations: list[str] = []
        self.registered: dict[int, int] = {}
        self.log: list[tuple[str, int]] = []
        self.entered: set[str] = set()
        self._handles = itertools.count(1)
        self._lock = threading.RLock()
        self._queues: dict[int, deque[Step]] = {COMPUTE: deque()}
        self._clocks: dict[int, Clock] = {COMPUTE: {}}
        self._marks: dict[int, Step | None] = {}
        self._known: dict[int, Clock] = defaultdict(dict)  # by host thread
        self._accesses: list[Access] = []
        self._memory: list[torch.Tensor] = []

    # what CudaDevice asks for

    def enter(self):
        self.entered.add(threading.current_thread().name)

    def allocate(self, num_rows, row_bytes):
        if num_rows * row_bytes > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        memory = torch.full((num_rows, row_bytes), POISON, dtype=torch.uint8)
        self._memory.append(memory)
        return memory

    def memory(self):
        return self.total, 2 * self.total

    def compute_stream(self):
        return self.stream

    def new_stream(self):
        stream = next(self._handles)
        self._queues[stream], self._clocks[stream] = deque(), {}
        return stream

    def new_event(self):
        event = next(self._handles)
        self._marks[event] = None
        return event

    def copy(self, target, source, size, stream):
        with self._lock:
            is_pinned = self._is_registered(source, size)
            self.log.append(("copy" if is_pinned else "pageable copy", source))
            begin = self._put(stream, lambda: ctypes.memset(target, POISON, size))
            self._access(begin, target, size, is_write=True)
            end = self._put(stream, lambda: ctypes.memmove(target, source, size))
            self._access(end, target, size, is_write=True)
            self._access(end, source, size, is_write=False)
            if not is_pinned:  # CUDA has read such memory when the call returns
                self._force(end)
                join(self._knows(), end.clock)
            self._move()

    def record(self, event, stream):
        with self._lock:
            self._marks[event] = self._put(stream, lambda: None)
            self._move()

    def wait(self, stream, event):
        with self._lock:
            mark = self._marks[event]
            if mark is not None:  # an event that was never recorded holds up nobody
                join(self._clocks[stream], mark.clock)
                self._put(stream, lambda: None, mark)
            self._move()

    def synchronize_event(self, event):
        with self._lock:
            mark = self._marks[event]
            if mark is not None:
                self.log.append(("synchronize event", event))
                self._force(mark)
                join(self._knows(), mark.clock)

    def synchronize_stream(self, stream):
        with self._lock:
            self.log.append(("synchronize stream", stream))
            join(self._knows(), self._clocks[stream])
            self._drain(stream)

    def register(self, pointer, size):
        with self._lock:
            self.log.append(("register", size))
            if self.refuse(size):
                raise PinningRefused("cudaErrorMemoryAllocation: out of memory")
            assert not any(p < pointer + size and pointer < p + n for p, n in self._pieces())
            self.registered[pointer] = size

    def unregister(self, pointer):
        self.host_writes(pointer, self.registered[pointer], "memory is unregistered")
        del self.registered[pointer]

    # what tests ask for

    def launch(self, address, expected, why="computation"):
        """Put a computation on torch's stream that finds these bytes when it begins and ends."""
        with self._lock:

            def look():
                if ctypes.string_at(address, len(expected)) != expected:
                    self.violations.append(f"{why}: wrong bytes")

            for _ in range(2):
                self._access(self._put(self.stream, look), address, len(expected), is_write=False)
            self._move()

    def host_writes(self, address, size, why="a buffer is overwritten"):
        """Tell that the calling thread writes to host memory now."""
        with self._lock:
            for other in self._overlapping(address, size):
                if not knows(self._knows(), other.step):
                    self.violations.append(f"{why} while it may still be copied from")
                else:
                    self._accesses.remove(other)

    def pending(self, stream):
        return len(self._queues[stream])

    def verify(self):
        """Let everything end, then tell what went wrong."""
        with self._lock:
            for stream in self._queues:
                self._drain(stream)
            assert self.violations == []

    # how it runs

    def _put(self, stream, run, after=None):
        clock = self._clocks[stream]
        join(clock, self._knows())
        clock[stream] = clock.get(stream, 0) + 1
        step = Step(stream, run, after, clock=dict(clock))
        self._queues[stream].append(step)
        return step

    def _access(self, step, begin, size, *, is_write):
        for other in self._overlapping(begin, size):
            if (is_write or other.is_write) and not knows(step.clock, other.step):
                kinds = [("reads", "writes")[a] for a in (other.is_write, is_write)]
                self.violations.append(f"nothing orders {' and '.join(kinds)} of a slot")
            elif is_write:  # whoever is ordered with this one is ordered with that one
                self._accesses.remove(other)
        self._accesses.append(Access(step, begin, begin + size, is_write))

    def _overlapping(self, begin, size):
        return [a for a in self._accesses if a.begin < begin + size and begin < a.end]

    def _knows(self):
        return self._known[threading.get_ident()]

    def _pieces(self):
        return list(self.registered.items())

    def _is_registered(self, pointer, size):
        return any(p <= pointer and pointer + size <= p + n for p, n in self._pieces())

    def _move(self):
        """Run what the whim has run now."""
        if self.eager:
            for stream in self._queues:
                self._drain(stream)
        while self.whims.random() < self.haste:
            queue = self._queues[self.whims.choice(list(self._queues))]
            if queue and (queue[0].after is None or queue[0].after.is_done):
                self._run(queue[0])

    def _force(self, step):
        while not step.is_done:
            self._run(self._queues[step.stream][0])

    def _drain(self, stream):
        while self._queues[stream]:
            self._run(self._queues[stream][0])

    def _run(self, step):
        if step.after is not None:
            self._force(step.after)
        step.run()
        step.is_done = True
        assert self._queues[step.stream].popleft() is step
