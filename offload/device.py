"""Where slots lie and who fills them: on a machine without a GPU, memory and reader threads."""

import mmap
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Fill = Callable[[Bytes], object]


class Arrival(Protocol):
    """A slot that is being filled."""

    def wait(self) -> None:
        """Block until the slot is filled. Raises what the filling raised."""
        ...

    def cancel(self) -> None:
        """Give the filling up, or wait until it has ended; afterwards nobody writes to the slot."""
        ...


class Device(Protocol):
    """Slots of one size, allocated once, and a way to fill them while others are read."""

    def start(self, slot: int, fill: Fill) -> Arrival:
        """Begin to fill a slot by calling `fill` with its bytes."""
        ...

    def view(self, slot: int) -> Bytes:
        """The bytes of a slot, without a copy."""
        ...

    def close(self) -> None:
        """Wait for what is under way and release threads."""
        ...


class HostArrival:
    """A slot of a HostDevice that is being filled by a reader thread."""

    def __init__(self, future: "Future[object]") -> None:
        self._future = future

    def wait(self) -> None:
        """Block until the reader is done. Raises what it raised."""
        self._future.result()

    def cancel(self) -> None:
        """Take the job from the queue; if a reader has it already, wait for its end."""
        if not self._future.cancel():
            self._future.exception()


class HostDevice:
    """Slots (N, slot_bytes) in one anonymous mapping, filled by a few threads.

    Page-aligned, as direct reads ask for. Nothing is allocated after construction.
    """

    def __init__(self, slots: Bytes, readers: ThreadPoolExecutor) -> None:
        self._slots = slots
        self._readers = readers

    def start(self, slot: int, fill: Fill) -> HostArrival:
        """Queue the filling of a slot; the readers take jobs in order."""
        return HostArrival(self._readers.submit(fill, self._slots[slot]))

    def view(self, slot: int) -> Bytes:
        """The bytes of a slot (slot_bytes,), without a copy."""
        view: Bytes = self._slots[slot]
        return view

    def close(self) -> None:
        """Wait for the readers and end them."""
        self._readers.shutdown(cancel_futures=True)


def open_host_device(slot_bytes: int, num_slots: int, num_readers: int = 2) -> HostDevice:
    """Map memory for the slots and start the readers.

    Two readers keep a disk busy with blobs of 2 MiB and more. Raises MemoryError, telling the size,
    if the mapping is refused.
    """
    size = slot_bytes * num_slots
    try:
        arena = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(
            f"{size:,} bytes for {num_slots} expert slots are not to be had"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        arena.madvise(mmap.MADV_HUGEPAGE)
    slots = np.frombuffer(arena, np.uint8).reshape(num_slots, slot_bytes)
    return HostDevice(slots, ThreadPoolExecutor(num_readers, thread_name_prefix="experts"))
