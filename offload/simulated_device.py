"""A device without bytes: a disk, a link and a clock that only computing and waiting move."""

from collections import deque
from collections.abc import Sequence
from math import ceil, inf

import numpy as np

from offload.cuda import CudaDevice
from offload.device import Bytes, Fill, HostDevice
from offload.store import CHUNK_BYTES


class VirtualClock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        """The time; what a pipeline takes for its clock."""
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class Channel:
    """A disk or a link: one transfer at a time, at full speed, in the order of arrival."""

    def __init__(self, bytes_per_s: float, transfer_bytes: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._transfer_bytes = transfer_bytes
        self._queue: deque[Transfer] = deque()
        self._current: Transfer | None = None
        self._began = 0.0
        self._cut_bytes: int | None = None  # where the current transfer ends, if it is given up
        self.ends_at = inf
        self.moved_bytes = 0

    def add(self, transfer: "Transfer", now: float) -> None:
        """Serve a transfer after those that are there."""
        self._queue.append(transfer)
        if self._current is None:
            self._begin_next(now)

    def finish(self) -> tuple["Transfer", bool]:
        """Go on to the time `ends_at`. Returns what ended then, and whether all of it has moved."""
        ended = self._current
        assert ended is not None
        is_whole = self._cut_bytes is None
        self.moved_bytes += self._transfer_bytes if self._cut_bytes is None else self._cut_bytes
        self._begin_next(self.ends_at)
        return ended, is_whole

    def give_up(self, transfer: "Transfer", now: float) -> bool:
        """End a transfer after its present chunk. True if it never began and is gone already."""
        if transfer is not self._current:
            self._queue.remove(transfer)
            return True
        moved = (now - self._began) * self._bytes_per_s
        cut = CHUNK_BYTES * ceil(moved / CHUNK_BYTES)
        if cut < self._transfer_bytes:
            self._cut_bytes = cut
            self.ends_at = self._began + cut / self._bytes_per_s
        return False

    def _begin_next(self, now: float) -> None:
        self._cut_bytes = None
        self._current = self._queue.popleft() if self._queue else None
        self._began = now
        duration = self._transfer_bytes / self._bytes_per_s
        self.ends_at = inf if self._current is None else now + duration


class Transfer:
    """An `Arrival`: a slot that is being filled through one channel after another."""

    def __init__(self, device: "SimulatedDevice", route: Sequence[Channel]) -> None:
        self._device = device
        self.route = list(route)  # channels still ahead, the present one first
        self.is_stopped = False
        self.is_cut = False
        self.done_at: float | None = None

    def is_ready(self) -> bool:
        """Whether it has ended, or is on the link: that it takes its course is all the host knows.

        Source: `CopyArrival` and `ReadArrival` of offload/transfer.py.
        """
        self._device.catch_up()
        return self.done_at is not None or self._device.is_on_link(self)

    def wait(self) -> None:
        """Let time pass until the filling has ended: computations wait, if the host does not."""
        assert not self.is_cut, "what is cut off never arrives"
        self._device.pass_time_until_done(self)

    def stop(self) -> None:
        """Give the filling up, if it is not on the link yet."""
        self._device.give_up(self)

    def join(self) -> None:
        """Let time pass until the host need not wait any more."""
        while not self.is_ready():
            self._device.pass_time_until_next()

    def has_failed(self) -> bool:
        """Whether the filling was cut off."""
        self._device.catch_up()
        return self.is_cut


class SimulatedDevice:
    """A `Device` whose slots hold nothing. `link_bytes_per_s` None: slots are host memory.

    Experts read from disk pass the disk and then the link, those that wait in host memory the link
    only. Both serve in order of arrival. A read is given up between chunks; a copy on the link, or
    waiting for it, takes its course. Speeds in bytes per second; infinite ones take no time.
    """

    def __init__(
        self,
        clock: VirtualClock,
        slot_bytes: int,
        disk_bytes_per_s: float,
        link_bytes_per_s: float | None = None,
    ) -> None:
        self._clock = clock
        self._disk = Channel(disk_bytes_per_s, slot_bytes)
        self._link = None if link_bytes_per_s is None else Channel(link_bytes_per_s, slot_bytes)
        self._channels = [self._disk] if self._link is None else [self._disk, self._link]
        self._row: Bytes = np.zeros(1, np.uint8)
        self.trust = HostDevice.trust if self._link is None else CudaDevice.trust

    def read(self, slot: int, fill: Fill) -> Transfer:  # noqa: ARG002  there are no bytes
        """Begin to fill a slot from disk."""
        return self._start(self._channels)

    def copy(self, slot: int, source: Bytes) -> Transfer:  # noqa: ARG002  there are no bytes
        """Begin to fill a slot from host memory."""
        assert self._link is not None, "without a link, slots are host memory"
        return self._start([self._link])

    def adopt(self, memory: Bytes) -> None:
        """Nothing to do."""

    def view(self, slot: int) -> Bytes:  # noqa: ARG002  all slots look alike
        """A byte that stands for any slot."""
        return self._row

    def release(self, slot: int) -> None:
        """Nothing to do: computing has moved the clock."""

    def fallbacks(self) -> tuple[str, ...]:
        """None."""
        return ()

    def close(self) -> None:
        """Nothing to do."""

    @property
    def disk_bytes(self) -> int:
        """Bytes that the disk has given by now, those of reads given up included."""
        self.catch_up()
        return self._disk.moved_bytes

    @property
    def link_bytes(self) -> int:
        """Bytes that have passed the link by now."""
        self.catch_up()
        return 0 if self._link is None else self._link.moved_bytes

    def is_on_link(self, transfer: Transfer) -> bool:
        """Whether a transfer passes the link now, or waits for it."""
        return bool(transfer.route) and transfer.route[0] is self._link

    def catch_up(self) -> None:
        """Let the channels do what they have done by now."""
        while (channel := self._next_channel()).ends_at <= self._clock.now:
            self._finish(channel)

    def pass_time_until_next(self) -> None:
        """Move the clock to the next end of a transfer on any channel."""
        channel = self._next_channel()
        self._clock.now = channel.ends_at
        self._finish(channel)

    def pass_time_until_done(self, transfer: Transfer) -> None:
        """Move the clock to the end of a transfer, if that lies ahead."""
        self.catch_up()
        while transfer.done_at is None:
            self.pass_time_until_next()

    def give_up(self, transfer: Transfer) -> None:
        """Take a read out of its queue, or end it with its present chunk."""
        self.catch_up()
        if transfer.is_ready() or transfer.is_stopped:
            return
        transfer.is_stopped = True
        if self._disk.give_up(transfer, self._clock.now):
            transfer.is_cut = True
            transfer.done_at = self._clock.now

    def _start(self, route: Sequence[Channel]) -> Transfer:
        self.catch_up()
        transfer = Transfer(self, route)
        route[0].add(transfer, self._clock.now)
        return transfer

    def _next_channel(self) -> Channel:
        return min(self._channels, key=lambda channel: channel.ends_at)

    def _finish(self, channel: Channel) -> None:
        """Let a channel end what it has; that goes on to the next channel, or is done."""
        ended_at = channel.ends_at
        transfer, is_whole = channel.finish()
        transfer.route.pop(0)
        if transfer.route and not transfer.is_stopped:
            transfer.route[0].add(transfer, ended_at)
            return
        transfer.is_cut = not is_whole or bool(transfer.route)
        transfer.done_at = ended_at
