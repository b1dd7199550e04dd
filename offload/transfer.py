"""Copies from host memory into the slots of a GPU, and what keeps them in order with its readers.

Order is by events alone. On the stream of copies, a copy waits for the event that the slot's last
readers recorded on the stream of computations (`free`); computations wait, on theirs, for the event
that the copy recorded (`ready`). The host waits for nothing but files.
"""

from bisect import bisect, insort
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from threading import Lock
from typing import Protocol

from offload.device import Bytes, IsCancelled


class PinningRefused(RuntimeError):
    """The driver does not register a piece of host memory."""


class Driver(Protocol):
    """What is asked of CUDA on one GPU. Streams and events are handles, memory is addresses."""

    def enter(self) -> None:
        """Make the GPU that of the calling thread."""
        ...

    def compute_stream(self) -> int:
        """The stream on which torch computes in the calling thread."""
        ...

    def new_stream(self) -> int:
        """A stream that waits for no other by itself."""
        ...

    def new_event(self) -> int:
        """An event that lets a waiting thread sleep; until it is recorded, nobody waits for it."""
        ...

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Put a copy from host memory to the GPU on a stream."""
        ...

    def record(self, event: int, stream: int) -> None:
        """Let an event stand for all that is on a stream now."""
        ...

    def wait(self, stream: int, event: int) -> None:
        """Let what comes on a stream wait for what an event stands for now."""
        ...

    def synchronize_event(self, event: int) -> None:
        """Block the calling thread until what an event stands for is done."""
        ...

    def synchronize_stream(self, stream: int) -> None:
        """Block the calling thread until all that is on a stream is done."""
        ...

    def register(self, pointer: int, size: int) -> None:
        """Lock exactly these bytes of host memory in place. Raises PinningRefused."""
        ...

    def unregister(self, pointer: int) -> None:
        """Unlock what was registered at an address."""
        ...


class CopyArrival:
    """A copy that has been issued, or could not be: over for the host, computations wait for it."""

    def __init__(self, order: Callable[[], None], error: RuntimeError | None = None) -> None:
        self._order = order
        self._error = error

    def is_ready(self) -> bool:
        """Always: what the host had to do is done."""
        return True

    def wait(self) -> None:
        """Let computations that are given out from now on wait for the copy.

        Raises the error that kept it from being issued.
        """
        if self._error is not None:
            raise self._error
        self._order()

    def stop(self) -> None:
        """Nothing: what is issued takes its course, and the next copy into the slot follows it."""

    def join(self) -> None:
        """Nothing: see `is_ready`."""

    def has_failed(self) -> bool:
        """Whether the copy could not be issued."""
        return self._error is not None


class ReadArrival:
    """A slot that a reader thread fills by way of a staging buffer."""

    def __init__(
        self,
        readers: ThreadPoolExecutor,
        stage: Callable[[IsCancelled], object],
        order: Callable[[], None],
    ) -> None:
        self._order = order
        self._is_stopped = False
        self._future: Future[object] = readers.submit(stage, lambda: self._is_stopped)

    def is_ready(self) -> bool:
        """Whether the copy has been issued, or never will be."""
        return self._future.done()

    def wait(self) -> None:
        """Block until the copy has been issued, and let computations wait for it.

        Raises what the reader raised.
        """
        self._future.result()
        self._order()

    def stop(self) -> None:
        """Take the job from the queue; a reader that has it already stops at its next chunk."""
        self._is_stopped = True
        self._future.cancel()

    def join(self) -> None:
        """Block until the reader is done, or will never begin."""
        if not self._future.done():  # a cancelled job is done before its reader has heard of it
            wait_for([self._future])

    def has_failed(self) -> bool:
        """Whether the reader raised, or never began."""
        return self._future.cancelled() or self._future.exception() is not None


class PinnedMemory:
    """Host memory that is registered as it is, to the byte; a pool would round it up."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self._kept: list[Bytes] = []  # memory must outlive its registration
        self._ranges: list[tuple[int, int]] = []

    def add(self, memory: Bytes) -> None:
        """Register a piece. Raises PinningRefused; it may be used all the same."""
        assert memory.flags.c_contiguous
        begin = memory.ctypes.data
        self._driver.register(begin, memory.nbytes)
        self._kept.append(memory)
        insort(self._ranges, (begin, begin + memory.nbytes))

    def holds(self, memory: Bytes) -> bool:
        """Whether memory lies in one registered piece as a whole."""
        begin = memory.ctypes.data
        index = bisect(self._ranges, begin, key=lambda piece: piece[0]) - 1
        return index >= 0 and begin + memory.nbytes <= self._ranges[index][1]

    def close(self) -> None:
        """Unregister all pieces; nothing copies from them any more."""
        for begin, _ in self._ranges:
            self._driver.unregister(begin)
        self._ranges.clear()
        self._kept.clear()


class SlotCopies:
    """The stream of copies into slots, and the events that tie it to the stream of computations.

    A slot's copies are in order among each other because there is one stream of them. Any thread
    may issue; computations are one thread's.
    """

    def __init__(self, begin: int, num_slots: int, slot_bytes: int, driver: Driver) -> None:
        self._begin = begin
        self._slot_bytes = slot_bytes
        self._driver = driver
        self._lock = Lock()
        self._computing = driver.compute_stream()
        self._copying = driver.new_stream()
        self._ready = [driver.new_event() for _ in range(num_slots)]
        self._free = [driver.new_event() for _ in range(num_slots)]
        for slot in range(num_slots):
            self.release(slot)  # of torch, whose kernels may still use what it has recycled here

    def issue(self, slot: int, source: Bytes, done: int | None = None) -> None:
        """Copy into a slot, once all that reads it is done; then record `done`, if given."""
        assert source.nbytes == self._slot_bytes
        assert source.flags.c_contiguous
        target = self._begin + slot * self._slot_bytes
        with self._lock:
            self._driver.wait(self._copying, self._free[slot])
            self._driver.copy(target, source.ctypes.data, self._slot_bytes, self._copying)
            self._driver.record(self._ready[slot], self._copying)
            if done is not None:
                self._driver.record(done, self._copying)

    def await_slot(self, slot: int) -> None:
        """Let computations to come wait for the last copy into a slot."""
        self._driver.wait(self._computing, self._ready[slot])

    def release(self, slot: int) -> None:
        """Let the next copy into a slot wait for the computations given out so far."""
        self._driver.record(self._free[slot], self._computing)

    def check_stream(self) -> None:
        """Computations must be given out on the stream that the events were recorded on."""
        assert self._driver.compute_stream() == self._computing, "torch's current stream changed"

    def synchronize(self) -> None:
        """Block until no copy is under way."""
        self._driver.synchronize_stream(self._copying)
