"""Slots in the memory of a GPU: torch owns them, CuPy copies into them on a stream of its own."""

import logging
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from offload.device import Arrival, Bytes, Fill, IsCancelled, map_rows
from offload.transfer import (
    CopyArrival,
    Driver,
    PinnedMemory,
    PinningRefused,
    ReadArrival,
    SlotCopies,
)

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

NUM_STAGING = 3  # one is filled by each of two readers while a third is copied from


class Gpu(Driver, Protocol):
    """A driver that gives memory of its GPU as well."""

    def allocate(self, num_rows: int, row_bytes: int) -> "Tensor":
        """Memory on the GPU, uint8 (num_rows, row_bytes). Raises torch.OutOfMemoryError."""
        ...

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        ...


class CupyDriver:
    """The CUDA runtime by way of CuPy; torch gives the memory and the stream of computations.

    Handles are passed as they are: CuPy's class for foreign streams is deprecated. CuPy clears the
    error of a failed call (`check_status` in its runtime.pyx) and lets go of Python's lock in all
    calls here that may block.
    """

    def __init__(self, index: int) -> None:
        from cupy import cuda

        self._cuda: Any = cuda
        self._runtime: Any = cuda.runtime
        self._index = index
        self._owned: list[object] = []  # destroyed with the driver
        self.enter()

    def enter(self) -> None:
        """Make the GPU that of the calling thread."""
        self._cuda.Device(self._index).use()

    def allocate(self, num_rows: int, row_bytes: int) -> "Tensor":
        """Memory of torch's, uint8 (num_rows, row_bytes). Raises torch.OutOfMemoryError."""
        import torch

        device = torch.device("cuda", self._index)
        return torch.empty((num_rows, row_bytes), dtype=torch.uint8, device=device)

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the GPU."""
        free, total = self._runtime.memGetInfo()
        return free, total

    def compute_stream(self) -> int:
        """Torch's current stream in the calling thread; 0 is the default one."""
        import torch

        stream: int = torch.cuda.current_stream(self._index).cuda_stream
        return stream

    def new_stream(self) -> int:
        """A stream that does not wait for the default one, on which torch computes."""
        return self._own(self._cuda.Stream(non_blocking=True))

    def new_event(self) -> int:
        """An event without time, on which a thread may sleep."""
        return self._own(self._cuda.Event(block=True, disable_timing=True))

    def copy(self, target: int, source: int, size: int, stream: int) -> None:
        """Put a copy from host memory to the GPU on a stream."""
        kind = self._runtime.memcpyHostToDevice
        self._runtime.memcpyAsync(target, source, size, kind, stream)

    def record(self, event: int, stream: int) -> None:
        """Let an event stand for all that is on a stream now."""
        self._runtime.eventRecord(event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Let what comes on a stream wait for what an event stands for now."""
        self._runtime.streamWaitEvent(stream, event)

    def synchronize_event(self, event: int) -> None:
        """Block the calling thread until what an event stands for is done."""
        self._runtime.eventSynchronize(event)

    def synchronize_stream(self, stream: int) -> None:
        """Block the calling thread until all that is on a stream is done."""
        self._runtime.streamSynchronize(stream)

    def register(self, pointer: int, size: int) -> None:
        """Lock exactly these bytes of host memory in place. Raises PinningRefused."""
        try:
            self._runtime.hostRegister(pointer, size, 0)
        except self._runtime.CUDARuntimeError as error:
            raise PinningRefused(str(error)) from error

    def unregister(self, pointer: int) -> None:
        """Unlock what was registered at an address."""
        self._runtime.hostUnregister(pointer)

    def _own(self, made: Any) -> int:
        self._owned.append(made)
        handle: int = made.ptr
        return handle


class Staging(NamedTuple):
    """A buffer between disk and GPU, and the event after the last copy from it."""

    memory: Bytes
    copied: int


class Refusal(NamedTuple):
    """How much host memory could not be pinned, and what that means."""

    size: int
    text: str


class CudaDevice:
    """Slots (N, slot_bytes) on a GPU. Nothing is allocated after construction.

    Host memory that was adopted is copied from as it lies; what comes from a file, or from memory
    that could not be pinned, goes through a few staging buffers that reader threads fill.
    For one thread only, with one stream of computations, but for the threads it has itself.
    A copy that is issued cannot be stopped, so a wrong guess costs a whole one: in simulations of
    CPM-2-MoE on an H100 fetching ahead pays only if next to all guesses are right.
    """

    trust = 0.97

    def __init__(
        self, slots: "Tensor", staging: Bytes, driver: Driver, num_readers: int = 2
    ) -> None:
        self._slots = slots
        self._driver = driver
        self._copies = SlotCopies(slots.data_ptr(), len(slots), slots.shape[1], driver)
        self._pinned = PinnedMemory(driver)
        self._refused: dict[str, Refusal] = {}
        self._staging: SimpleQueue[Staging] = SimpleQueue()
        for row in staging:
            self._staging.put(Staging(row, driver.new_event()))
        self._pin(staging, "staging buffers", "reads from disk are copied more slowly")
        self._readers = ThreadPoolExecutor(num_readers, "experts", driver.enter)

    def read(self, slot: int, fill: Fill) -> Arrival:
        """Queue the filling of a slot; the readers take jobs in order."""
        stage = partial(self._stage, slot, fill)
        return ReadArrival(self._readers, stage, partial(self._copies.await_slot, slot))

    def copy(self, slot: int, source: Bytes) -> Arrival:
        """Issue a copy at once, from memory that is pinned; else by way of a reader."""
        if not self._pinned.holds(source):
            return self.read(slot, lambda out, _: np.copyto(out, source))
        order = partial(self._copies.await_slot, slot)
        try:
            self._copies.issue(slot, source)
        except RuntimeError as error:  # CUDA's; it is for whoever waits
            return CopyArrival(order, error)
        return CopyArrival(order)

    def _stage(self, slot: int, fill: Fill, is_cancelled: IsCancelled) -> None:
        """In a reader thread: fill a buffer that is free again, and issue the copy from it."""
        buffer = self._staging.get()
        try:
            self._driver.synchronize_event(buffer.copied)
            fill(buffer.memory, is_cancelled)
            self._copies.issue(slot, buffer.memory, buffer.copied)
        finally:
            self._staging.put(buffer)

    def adopt(self, memory: Bytes) -> None:
        """Pin memory, to the byte. If that is refused it is used all the same, more slowly."""
        self._pin(memory, "host memory", "experts there are copied twice")

    def _pin(self, memory: Bytes, what: str, cost: str) -> None:
        try:
            self._pinned.add(memory)
        except PinningRefused as error:
            if what not in self._refused:
                logger.warning("%s cannot be pinned, and %s: %s", what, cost, error)
                self._refused[what] = Refusal(0, f"{what} cannot be pinned, and {cost}: {error}")
            refusal = self._refused[what]
            self._refused[what] = refusal._replace(size=refusal.size + memory.nbytes)

    def view(self, slot: int) -> "Tensor":
        """The bytes of a slot, uint8 (slot_bytes,), without a copy."""
        self._copies.check_stream()
        return self._slots[slot]

    def release(self, slot: int) -> None:
        """Let the next copy into a slot wait for the computations given out so far."""
        self._copies.release(slot)

    def fallbacks(self) -> tuple[str, ...]:
        """What could not be pinned, and why."""
        return tuple(f"{size:,} bytes of {text}" for size, text in self._refused.values())

    def close(self) -> None:
        """End the readers, wait for the copies that are under way, and unpin host memory."""
        self._readers.shutdown(cancel_futures=True)
        self._driver.enter()
        self._copies.synchronize()
        self._pinned.close()


def missing_for_cuda() -> str | None:
    """What keeps this process from using a GPU; None if nothing does."""
    import torch

    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU, or was built without CUDA"
    if find_spec("cupy") is None:
        return "CuPy is not installed; run: pip install 'infmoe[gpu]'"
    return None


def open_cuda_device(
    slot_bytes: int, num_slots: int, num_readers: int = 2, driver: Gpu | None = None
) -> CudaDevice:
    """Allocate slots on torch's current GPU, for computations on torch's current stream.

    Two readers keep a disk busy with blobs of 2 MiB and more. Raises MemoryError, with the sum, if
    the slots do not fit the GPU or the staging buffers the host.
    """
    import torch

    driver = driver or CupyDriver(torch.cuda.current_device())
    staging = map_rows(NUM_STAGING, slot_bytes)
    try:
        slots = driver.allocate(num_slots, slot_bytes)
    except torch.OutOfMemoryError as error:
        free, total = driver.memory()
        raise MemoryError(
            f"{num_slots * slot_bytes:,} bytes for {num_slots} experts do not fit the GPU, of "
            f"which {free:,} of {total:,} bytes are free; give experts less of its memory, or end "
            "what else uses it"
        ) from error
    return CudaDevice(slots, staging, driver, num_readers)
