"""Experts that wait in host memory for their turn in a GPU's slots: the tier between disk and GPU.

Exclusive: an expert is either pinned to a slot, or here, or on disk only.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from offload.device import Bytes, Device, map_rows
from offload.slots import Key

GRANULE_BYTES = 2**30  # host memory is handed to the device in pieces: filled first, then pinned


class HostBank:
    """Rows of host memory (N, slot_bytes), one expert in each, read-only once filled."""

    def __init__(self, rows: Bytes, keys: Sequence[Key]) -> None:
        self._rows = rows
        self._index = {key: i for i, key in enumerate(keys)}

    def get(self, key: Key) -> Bytes | None:
        """The bytes of an expert, or None if it does not wait here."""
        index = self._index.get(key)
        return None if index is None else self._rows[index]

    def __len__(self) -> int:
        return len(self._index)


def fill_bank(
    keys: Sequence[Key],
    slot_bytes: int,
    read: Callable[[Key, Bytes], object],
    device: Device,
    on_each: Callable[[int], None] | None = None,
    num_readers: int = 2,
) -> HostBank:
    """Read experts into host memory and let the device adopt it, piece by piece, once filled.

    Memory that is pinned before it is filled is zeroed first, for nothing. `on_each` is given the
    number of experts read.
    Raises MemoryError if the memory is refused, and what the reading raises.
    """
    rows = map_rows(len(keys), slot_bytes)
    step = max(GRANULE_BYTES // slot_bytes, 1)
    with ThreadPoolExecutor(num_readers, thread_name_prefix="bank") as readers:
        jobs = [readers.submit(read, key, rows[i]) for i, key in enumerate(keys)]
        try:
            for done, job in enumerate(jobs, 1):
                job.result()
                if on_each:
                    on_each(done)
                if done % step == 0 or done == len(jobs):
                    device.adopt(rows[(done - 1) // step * step : done])
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise
    return HostBank(rows, keys)
