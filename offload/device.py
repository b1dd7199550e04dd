"""Where slots lie and who fills them; without a GPU that is memory and reader threads."""

import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import TYPE_CHECKING, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Bytes = NDArray[np.uint8]
Blob: TypeAlias = "Bytes | Tensor"  # the bytes of a slot, in host memory or on a GPU
IsCancelled = Callable[[], bool]
Fill = Callable[[Bytes, IsCancelled], object]


class Arrival(Protocol):
    """A slot that is being filled."""

    def is_ready(self) -> bool:
        """Whether the filling has ended, well or badly, as far as the host can tell."""
        ...

    def wait(self) -> None:
        """Block until computations may read the slot. Raises what the filling raised."""
        ...

    def stop(self) -> None:
        """Ask for the filling to be given up, without blocking; `is_ready` tells when it has."""
        ...

    def join(self) -> None:
        """Block until the filling has ended, well or badly. Raises nothing."""
        ...

    def has_failed(self) -> bool:
        """Whether a filling that has ended left something else in the slot than was asked for."""
        ...


class Device(Protocol):
    """Slots of one size, allocated once, and ways to fill them while others are read.

    `trust` is the share of right guesses from which filling slots on a guess pays.
    """

    @property
    def trust(self) -> float: ...

    def read(self, slot: int, fill: Fill) -> Arrival:
        """Begin to fill a slot from a file: `fill` is called with host memory of a slot's size."""
        ...

    def copy(self, slot: int, source: Bytes) -> Arrival:
        """Begin to fill a slot from host memory, which stays as it is until the copy has landed."""
        ...

    def adopt(self, memory: Bytes) -> None:
        """Make host memory fast to copy from. It must stay where it is until `close`."""
        ...

    def view(self, slot: int) -> Blob:
        """The bytes of a slot, without a copy."""
        ...

    def release(self, slot: int) -> None:
        """Tell that all computations that read the slot have been given out."""
        ...

    def fallbacks(self) -> tuple[str, ...]:
        """What works in a slower way than it should, and why."""
        ...

    def close(self) -> None:
        """Wait for what is under way and release threads and memory."""
        ...


class HostArrival:
    """A slot of a HostDevice that is being filled by a reader thread."""

    def __init__(self, readers: ThreadPoolExecutor, fill: Fill, out: Bytes) -> None:
        self._is_stopped = False
        self._future: Future[object] = readers.submit(fill, out, lambda: self._is_stopped)

    def is_ready(self) -> bool:
        """Whether the reader is done, or never began."""
        return self._future.done()

    def wait(self) -> None:
        """Block until the reader is done. Raises what it raised."""
        self._future.result()

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


class HostDevice:
    """Slots (N, slot_bytes) in one anonymous mapping, filled by a few threads.

    Page-aligned, as direct reads ask for. Nothing is allocated after construction. A wrong guess
    costs no more than the time until it is known to be wrong, and a chunk: reads can be stopped.
    """

    trust = 0.6

    def __init__(self, slots: Bytes, readers: ThreadPoolExecutor) -> None:
        self._slots = slots
        self._readers = readers

    def read(self, slot: int, fill: Fill) -> HostArrival:
        """Queue the filling of a slot; the readers take jobs in order."""
        return HostArrival(self._readers, fill, self._slots[slot])

    def copy(self, slot: int, source: Bytes) -> HostArrival:
        """Queue a copy from memory to memory."""
        return self.read(slot, lambda out, _: np.copyto(out, source))

    def adopt(self, memory: Bytes) -> None:
        """Nothing to do: all host memory is alike here."""

    def view(self, slot: int) -> Bytes:
        """The bytes of a slot (slot_bytes,), without a copy."""
        view: Bytes = self._slots[slot]
        return view

    def release(self, slot: int) -> None:
        """Nothing to do: computations on the host are over when they return."""

    def fallbacks(self) -> tuple[str, ...]:
        """None: there is one way only."""
        return ()

    def close(self) -> None:
        """Wait for the readers and end them."""
        self._readers.shutdown(cancel_futures=True)


def open_host_device(slot_bytes: int, num_slots: int, num_readers: int = 2) -> HostDevice:
    """Map memory for the slots and start the readers.

    Two readers keep a disk busy with blobs of 2 MiB and more. Raises MemoryError, telling the size,
    if the mapping is refused.
    """
    slots = map_rows(num_slots, slot_bytes)
    return HostDevice(slots, ThreadPoolExecutor(num_readers, thread_name_prefix="experts"))


def map_rows(num_rows: int, row_bytes: int) -> Bytes:
    """Anonymous, page-aligned memory (num_rows, row_bytes), on huge pages where they are to be had.

    Memory is taken as rows are written. Raises MemoryError, telling the size, if it is refused.
    """
    size = row_bytes * num_rows
    try:
        arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{size:,} bytes for {num_rows} experts are not to be had") from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(arena, np.uint8).reshape(num_rows, row_bytes)
