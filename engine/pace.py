"""How fast requests come to an end, to tell those that are refused when to come back."""

from collections import deque
from time import perf_counter

NUM_ENDS = 32  # what is told follows the last of them
UNKNOWN_S = 1.0


class Pace:
    """Time per request over the last ends; what passes while nobody is served does not count.

    Times in seconds, of `perf_counter` where none is given.
    """

    def __init__(self) -> None:
        self._mark = perf_counter()
        self._spans: deque[float] = deque(maxlen=NUM_ENDS)

    def begin(self, now: float | None = None) -> None:
        """There is work again."""
        self._mark = perf_counter() if now is None else now

    def note_end(self, now: float | None = None) -> None:
        """A request has ended."""
        now = perf_counter() if now is None else now
        self._spans.append(now - self._mark)
        self._mark = now

    def wait_s(self, num_requests: int, now: float | None = None) -> float:
        """How long so many requests will take. Before the first end: as long as it is waited for.

        Example: with ends 2 s and 4 s after the begin, 3 requests take 6 s.
        """
        if not self._spans:
            now = perf_counter() if now is None else now
            return max(now - self._mark, UNKNOWN_S)
        return num_requests * sum(self._spans) / len(self._spans)
