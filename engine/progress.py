"""How far the loading of a model has come, in bytes."""

import time
from collections.abc import Callable

OnBytes = Callable[[int], None]


def ignore_bytes(_num_bytes: int) -> None:
    """For who does not want to know how much has been read."""


class LoadProgress:
    """Bytes of a model that have been read, of how many; written by one thread, read by any.

    The total is what lies in the files, but for their headers, and is 0 until it is known.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.read_bytes = 0
        self.total_bytes = 0
        self._clock = clock
        self._begin_s: float | None = None
        self._last_s = clock()

    def begin(self, total_bytes: int) -> None:
        """Reading begins; that much is to come."""
        self.read_bytes, self.total_bytes = 0, total_bytes
        self._begin_s = self._last_s = self._clock()

    def add(self, num_bytes: int) -> None:
        """So much more has been read; never more than the total, which may have been a guess."""
        self.read_bytes = min(self.read_bytes + num_bytes, self.total_bytes)
        self._last_s = self._clock()

    def finish(self) -> None:
        """All has been read."""
        self.read_bytes = self.total_bytes

    def elapsed_s(self) -> float:
        """Time since reading began; 0 before."""
        return 0.0 if self._begin_s is None else self._clock() - self._begin_s

    def idle_s(self) -> float:
        """Time since the last byte came, or since anything began."""
        return self._clock() - self._last_s

    def eta_s(self) -> float | None:
        """Time that the rest takes at the rate so far; None before anything has been read."""
        if self._begin_s is None or not self.read_bytes:
            return None
        rate_s = (self._last_s - self._begin_s) / self.read_bytes  # per byte
        return max(0.0, rate_s * (self.total_bytes - self.read_bytes))
