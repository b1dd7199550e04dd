"""Which experts have been wanted most of late, so that pins go to those that repay them."""

from collections.abc import Iterable

from offload.slots import Key

HALVE_EVERY = 4096  # layers computed; older wants count for less and less
FACTOR, MARGIN = 1.5, 4.0  # a pin moves only to an expert that is clearly wanted more often


class Popularity:
    """Decaying counts of wants.

    Where all experts are wanted alike, as in a scan over all of them, no pin moves, and the pinned
    share is hit; where some are wanted more often, pins drift to them.
    """

    def __init__(self) -> None:
        self._counts: dict[Key, float] = {}
        self._noted = 0

    def note(self, keys: Iterable[Key]) -> bool:
        """Count the wants of one layer. True if all counts were halved before."""
        self._noted += 1
        is_halved = self._noted % HALVE_EVERY == 0
        if is_halved:
            self._counts = {key: count / 2 for key, count in self._counts.items()}
        for key in keys:
            self._counts[key] = self._counts.get(key, 0.0) + 1.0
        return is_halved

    def count(self, key: Key) -> float:
        """Wants of late."""
        return self._counts.get(key, 0.0)

    def deserves(self, key: Key, pinned_count: float) -> bool:
        """Whether an expert should have the pin of one that was wanted so often."""
        return self.count(key) > FACTOR * pinned_count + MARGIN
