"""The adapters that requests may name: versions, hot replacement, and a bound in bytes."""

import threading
import weakref
from copy import copy
from dataclasses import dataclass

import torch

from engine.adapters import Adapter
from engine.errors import CheckpointError, Overloaded, RequestError

MAX_NAMED = 20  # in an error


@dataclass(slots=True, eq=False)
class _Entry:
    """An adapter, and the copy of it that requests hold; both have the same vectors."""

    adapter: Adapter
    lent: weakref.ref[Adapter] | None = None
    is_pinned: bool = False

    @property
    def nbytes(self) -> int:
        return self.adapter.prompt_PD.nbytes

    def is_in_flight(self) -> bool:
        return self.lent is not None and self.lent() is not None

    def lend(self) -> Adapter:
        adapter = self.lent() if self.lent else None
        if adapter is None:
            adapter = copy(self.adapter)
            self.lent = weakref.ref(adapter)
        return adapter


class AdapterTable:
    """Adapters by name and version, together within `limit_bytes`. For any number of threads.

    The version of a name that was added last is what the name alone means; requests in flight keep
    theirs. In flight is what `resolve` handed out and somebody still holds: nobody has to give
    anything back, so no way out of a request can forget to. The others go when room is needed, the
    one that was asked for longest ago first.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str], _Entry] = {}  # the one asked for last is last
        self._current: dict[str, str] = {}
        self._removed: list[_Entry] = []  # some may be in flight, and take room

    @property
    def limit_bytes(self) -> int:
        """What all vectors may take."""
        return self._limit_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all vectors, with those that were removed but are in flight."""
        with self._lock:
            return self._count_bytes()

    def known(self) -> list[str]:
        """All, as `name@version`, sorted."""
        with self._lock:
            return self._references()

    def add(self, adapter: Adapter) -> Adapter:
        """Take in an adapter, which is from now on what its name means; again, if it is known.

        Returns what `resolve` does: held from the first moment, so room is not made by it.

        Raises CheckpointError if that version is known with another content or the vectors are
        larger than the whole table, Overloaded if there is no room beside those in flight.
        """
        key = (adapter.name, adapter.version)
        with self._lock:
            known = self._entries.get(key)
            if known is None:
                self._make_room(adapter)
                known = _Entry(adapter)
            elif not _is_same(known.adapter, adapter):
                raise CheckpointError(
                    f"adapter {adapter.reference} is known with another content; give the new one "
                    "another version"
                )
            self._entries[key] = known
            self._touch(key)
            self._current[adapter.name] = adapter.version
            return known.lend()

    def find(self, name: str, version: str) -> Adapter | None:
        """As `resolve`, but None if that version is not here."""
        with self._lock:
            key = (name, version)
            if key not in self._entries:
                return None
            self._touch(key)
            return self._entries[key].lend()

    def holds(self, name: str, version: str) -> bool:
        """Whether that version is here; to ask is not to use."""
        with self._lock:
            return (name, version) in self._entries

    def set_pin(self, name: str, version: str, *, is_pinned: bool) -> bool:
        """Let a version stay, or no longer, when room is needed; False if it is not here."""
        with self._lock:
            entry = self._entries.get((name, version))
            if entry is not None:
                entry.is_pinned = is_pinned
            return entry is not None

    def count(self) -> tuple[int, int]:
        """How many are here, and how many of them are pinned."""
        with self._lock:
            entries = self._entries.values()
            return len(entries), sum(entry.is_pinned for entry in entries)

    def discard(self, name: str, version: str) -> bool:
        """As `remove`, but False if that version is not here."""
        with self._lock:
            is_here = (name, version) in self._entries
            if is_here:
                self._forget((name, version))
            return is_here

    def is_pinned(self, name: str, version: str) -> bool:
        """Whether that version is here to stay."""
        with self._lock:
            entry = self._entries.get((name, version))
            return entry is not None and entry.is_pinned

    def resolve(self, reference: str) -> Adapter:
        """Look up `name`, which means the version added last, or `name@version`.

        Raises RequestError, which lists what is known.
        """
        name, mark, version = reference.partition("@")
        with self._lock:
            key = (name, version if mark else self._current.get(name, ""))
            if key not in self._entries:
                raise RequestError(
                    f"adapter {reference[:100]!r} is not known; {self._tell_known()}", "adapter"
                )
            self._touch(key)
            return self._entries[key].lend()

    def remove(self, reference: str) -> None:
        """Forget one version, or all of a name. Requests in flight keep theirs.

        A name whose newest version is forgotten means nothing until one is added again. Raises
        RequestError if nothing is known by that reference.
        """
        name, mark, version = reference.partition("@")
        with self._lock:
            keys = [
                key for key in self._entries if key[0] == name and (not mark or key[1] == version)
            ]
            if not keys:
                raise RequestError(
                    f"adapter {reference[:100]!r} is not known; {self._tell_known()}", "adapter"
                )
            for key in keys:
                self._forget(key)

    def _make_room(self, adapter: Adapter) -> None:
        """Forget as many adapters as it takes, or none if that would not help."""
        needed, limit = adapter.prompt_PD.nbytes, self._limit_bytes
        if needed > limit:
            raise CheckpointError(
                f"adapter {adapter.reference} takes {needed:,} bytes; the table holds {limit:,}"
            )
        used = self._count_bytes()
        leaving = []
        for key, entry in self._entries.items():
            if used + needed <= limit:
                break
            if not entry.is_in_flight() and not entry.is_pinned:
                leaving.append(key)
                used -= entry.nbytes
        if used + needed > limit:
            raise Overloaded(
                f"adapter {adapter.reference} takes {needed:,} bytes, those in flight or "
                f"pinned {used:,}; the table holds {limit:,}: try again later"
            )
        for key in leaving:
            self._forget(key)

    def _forget(self, key: tuple[str, str]) -> None:
        name, version = key
        self._removed.append(self._entries.pop(key))
        if self._current.get(name) == version:
            del self._current[name]

    def _count_bytes(self) -> int:
        self._removed = [entry for entry in self._removed if entry.is_in_flight()]
        return sum(entry.nbytes for entry in (*self._entries.values(), *self._removed))

    def _touch(self, key: tuple[str, str]) -> None:
        self._entries[key] = self._entries.pop(key)

    def _references(self) -> list[str]:
        return sorted(entry.adapter.reference for entry in self._entries.values())

    def _tell_known(self) -> str:
        names = self._references()
        if not names:
            return "none is"
        more = len(names) - MAX_NAMED
        return f"known: {', '.join(names[:MAX_NAMED])}" + (f" and {more} more" if more > 0 else "")


def _is_same(one: Adapter, other: Adapter) -> bool:
    same_base = one.base_fingerprint == other.base_fingerprint
    same_words = one.slots == other.slots and one.defaults == other.defaults
    return same_words and same_base and torch.equal(one.prompt_PD, other.prompt_PD)
