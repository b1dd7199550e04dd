"""Which expert is in which slot: bookkeeping only, no bytes.

A slot is free, held (being filled or read) or idle; an idle one that is not pinned may be taken for
another expert, the one that was used longest ago first.
"""

from collections import OrderedDict
from typing import NamedTuple


class Key(NamedTuple):
    """One expert of one layer ('decoder-3')."""

    layer: str
    expert: int


class SlotTable:
    """Owners, holds, pins and order of use of a fixed number of slots. Not thread-safe.

    Source: least recently used with a pinned share. A scan over more experts than there are slots
    hits nothing under plain LRU, but always the pinned share.
    """

    def __init__(self, num_slots: int) -> None:
        if num_slots < 1:
            raise ValueError(f"num_slots is {num_slots}; it must be at least 1")
        self._slots: OrderedDict[Key, int] = OrderedDict()  # least recently used first
        self._free = list(range(num_slots))[::-1]
        self._holds: dict[Key, int] = {}
        self._pinned: set[Key] = set()
        self.num_slots = num_slots
        self.evictions = 0

    def hold(self, key: Key) -> int | None:
        """The slot of an expert that is there, held and counted as used now; else None."""
        slot = self._slots.get(key)
        if slot is not None:
            self._slots.move_to_end(key)
            self._holds[key] = self._holds.get(key, 0) + 1
        return slot

    def take(self, key: Key) -> int | None:
        """A slot to be filled with an expert that is not there, held; None if all are in use."""
        assert key not in self._slots
        if not self._free:
            idle = (k for k in self._slots if not self._holds.get(k) and k not in self._pinned)
            victim = next(idle, None)
            if victim is None:
                return None
            self.drop(victim)
            self.evictions += 1
        slot = self._free.pop()
        self._slots[key] = slot
        self._holds[key] = 1
        return slot

    def release(self, key: Key) -> None:
        """End one hold."""
        assert self._holds[key] > 0
        self._holds[key] -= 1
        if not self._holds[key]:
            del self._holds[key]

    def pin(self, key: Key) -> None:
        """Keep an expert that is there for good."""
        assert key in self._slots
        self._pinned.add(key)

    def drop(self, key: Key) -> None:
        """Forget an expert, held or not: it was never filled, or its slot is wanted."""
        self._free.append(self._slots.pop(key))
        self._holds.pop(key, None)
        self._pinned.discard(key)

    def resident(self) -> set[Key]:
        """The experts that are there."""
        return set(self._slots)
