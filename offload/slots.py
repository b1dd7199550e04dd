"""Which expert is in which slot: bookkeeping only, no bytes.

Slots belong to zones, and a zone never takes a slot from another. A slot is free, held (being
filled or read) or idle; an idle one may be taken for another expert of its zone, the one that was
used longest ago first; except in the zone `pinned`, whose experts stay.
"""

from collections import OrderedDict
from collections.abc import Mapping
from typing import Literal, NamedTuple

Zone = Literal["pinned", "decode", "sweep"]


class Key(NamedTuple):
    """One expert of one layer ('decoder-3')."""

    layer: str
    expert: int


class SlotTable:
    """Owners, holds and order of use of a fixed number of slots. Not thread-safe.

    Source: least recently used beside a pinned share. A scan over more experts than there are slots
    hits nothing under plain LRU, but always the pinned share.
    """

    def __init__(self, zones: Mapping[Zone, int]) -> None:
        if min(zones.values()) < 0 or sum(zones.values()) < 1:
            raise ValueError(f"slots per zone are {dict(zones)}; at least one slot is needed")
        self._free: dict[Zone, list[int]] = {}
        begin = 0
        for zone, count in zones.items():
            self._free[zone] = list(range(begin, begin + count))[::-1]
            begin += count
        self._used: dict[Zone, OrderedDict[Key, None]] = {zone: OrderedDict() for zone in zones}
        self._place: dict[Key, tuple[int, Zone]] = {}
        self._holds: dict[Key, int] = {}
        self.num_slots = begin
        self.evictions = 0

    def hold(self, key: Key) -> bool:
        """Hold an expert that is there, and count it as used now. False if it is not there."""
        if key not in self._place:
            return False
        self._touch(key)
        self._holds[key] = self._holds.get(key, 0) + 1
        return True

    def take(self, key: Key, zone: Zone) -> int | None:
        """A slot of the zone to be filled with an expert that is not there, held.

        None if all are in use.
        """
        assert key not in self._place
        if not self._free[zone]:
            victim = None if zone == "pinned" else self._victim(zone)
            if victim is None:
                return None
            self.give_back(self.detach(victim), zone)
            self.evictions += 1
        slot = self._free[zone].pop()
        self._place[key] = slot, zone
        self._touch(key)
        self._holds[key] = 1
        return slot

    def slot(self, key: Key) -> int:
        """The slot of an expert that is there."""
        return self._place[key][0]

    def zone(self, key: Key) -> Zone:
        """The zone in which an expert is."""
        return self._place[key][1]

    def release(self, key: Key) -> None:
        """End one hold."""
        assert self._holds[key] > 0
        self._holds[key] -= 1
        if not self._holds[key]:
            del self._holds[key]

    def swap_zones(self, one: Key, other: Key) -> None:
        """Let two experts that are there change zones; each stays in its slot, no bytes move."""
        (slot, zone), (other_slot, other_zone) = self._place[one], self._place[other]
        for key, place in ((one, (slot, other_zone)), (other, (other_slot, zone))):
            del self._used[self._place[key][1]][key]
            self._place[key] = place
            self._touch(key)

    def in_zone(self, zone: Zone) -> list[Key]:
        """The experts that are in slots of a zone."""
        return list(self._used[zone])

    def detach(self, key: Key) -> int:
        """Forget an expert, held or not. Returns its slot, not yet to be used for another."""
        slot, zone = self._place.pop(key)
        del self._used[zone][key]
        self._holds.pop(key, None)
        return slot

    def give_back(self, slot: int, zone: Zone) -> None:
        """Make a detached slot free: nobody writes to it any more."""
        self._free[zone].append(slot)

    def __contains__(self, key: Key) -> bool:
        return key in self._place

    def resident(self) -> set[Key]:
        """The experts that are there or on their way."""
        return set(self._place)

    def _touch(self, key: Key) -> None:
        used = self._used[self._place[key][1]]
        used[key] = None  # least recently used first
        used.move_to_end(key)

    def _victim(self, zone: Zone) -> Key | None:
        return next((key for key in self._used[zone] if key not in self._holds), None)
