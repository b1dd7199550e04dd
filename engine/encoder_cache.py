"""What the encoder made of texts, kept for those that ask for the same again. S length, D width.

Of a decoder-only model that is the context, of which a text that only begins alike uses the part.
"""

import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from engine.adapters import Slots
from engine.request import Request
from engine.sources import Begun
from engine.stats import CacheStats

MIN_SHARED = 16  # tokens; to read fewer with the rest costs less than to read the rest alone


class _Key(NamedTuple):
    """What must be equal. The vectors themselves are compared beside it: see `_Entry`."""

    salt: str
    ids: tuple[int, ...]
    adapter: str
    slots: Slots | None


@dataclass(frozen=True, slots=True)
class _Entry:
    """An output, and the vectors it was made with.

    These are not held, so that their table counts the adapter as in flight no longer than it is. A
    name and version that come again with other vectors find nothing.
    """

    encoded_SD: Tensor
    vectors: weakref.ref[Tensor] | None


class EncoderCache:
    """Outputs of the encoder within `limit_bytes`; the one used longest ago goes first.

    Only for requests with a salt, and only those of one salt share: who does not know it can tell
    from no time whether somebody else has sent a text. Of the bytes, those of the outputs count.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._entries: dict[_Key, _Entry] = {}  # the one used last is last
        self._nbytes = 0
        self._hits = self._misses = self._partial_hits = self._hit_tokens = 0

    @property
    def stats(self) -> CacheStats:
        """Counts and bytes as they are now; other threads may ask."""
        counts = self._partial_hits, self._hit_tokens
        return CacheStats(self._hits, self._misses, self._nbytes, *counts)

    def __len__(self) -> int:
        return len(self._entries)

    def knows(self, request: Request) -> bool:
        """Whether `find` would find something."""
        key = _key(request)
        entry = self._entries.get(key) if key else None
        return entry is not None and _is_of(entry, request)

    def find(self, request: Request) -> Tensor | None:
        """The output (S, D) for a request, without padding; it counts as a hit or a miss."""
        key = _key(request)
        if key is None:
            return None
        if not self.knows(request):
            self._misses += 1
            return None
        self._hits += 1
        self._hit_tokens += len(request.source.ids)
        entry = self._entries[key] = self._entries.pop(key)
        return entry.encoded_SD

    def begun(self, request: Request) -> Begun | None:
        """The most of a request's text that begins a kept one, where only what came before counts.

        None if it is no more than a few tokens, or the vectors of an adapter do not all come first.
        """
        key = _key(request)
        if key is None or (key.slots is not None and key.slots.front != key.slots.num_vectors):
            return None
        best, found = MIN_SHARED - 1, None
        for other, entry in self._entries.items():
            if other._replace(ids=key.ids) == key and _is_of(entry, request):
                shared = num_shared(key.ids, other.ids)
                if shared > best:
                    best, found = shared, entry
        if found is None:
            return None
        vectors = key.slots.front if key.slots else 0
        return Begun(found.encoded_SD[: vectors + best], best)

    def count_begun(self, part: Begun) -> None:
        """Count a text of which the rest alone is read."""
        self._partial_hits += 1
        self._hit_tokens += part.num_ids

    def keep(self, request: Request, encoded_SD: Tensor) -> None:
        """Keep a copy of an output, if there is a salt, room, and no NaN in it."""
        key = _key(request)
        if key is None or encoded_SD.nbytes > self._limit_bytes or self.knows(request):
            return
        if not bool(torch.isfinite(encoded_SD).all()):
            return
        self._forget(key)
        self._shrink(self._limit_bytes - encoded_SD.nbytes)
        prompt_PD = request.adapter.prompt_PD if request.adapter else None
        vectors = None if prompt_PD is None else weakref.ref(prompt_PD)
        self._entries[key] = _Entry(encoded_SD.clone(), vectors)
        self._nbytes += encoded_SD.nbytes

    def resize(self, limit_bytes: int) -> None:
        """Let go what is beyond a new limit."""
        self._limit_bytes = limit_bytes
        self._shrink(limit_bytes)

    def _shrink(self, limit_bytes: int) -> None:
        while self._entries and self._nbytes > limit_bytes:
            self._forget(next(iter(self._entries)))

    def _forget(self, key: _Key) -> None:
        if (entry := self._entries.pop(key, None)) is not None:
            self._nbytes -= entry.encoded_SD.nbytes


def num_shared(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Ids with which both begin."""
    low, high = 0, min(len(one), len(other))
    while low < high:  # slices are compared faster than ids one by one
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _key(request: Request) -> _Key | None:
    if request.salt is None or not request.source.num_positions:
        return None  # to read nothing costs nothing
    adapter = request.adapter
    name, slots = (adapter.reference, adapter.slots) if adapter else ("", None)
    return _Key(request.salt, request.source.ids, name, slots)


def _is_of(entry: _Entry, request: Request) -> bool:
    vectors = entry.vectors() if entry.vectors else None
    return vectors is (request.adapter.prompt_PD if request.adapter else None)
