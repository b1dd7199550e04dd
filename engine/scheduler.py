"""Who goes into the encoder next: fair to all keys, urgent ones first, in time. No tensors here."""

from collections import deque
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass
from typing import Generic, NamedTuple, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much runs at once. Times in seconds.

    `max_rows` decode together, with caches of `cache_bytes` at most (None: no limit), but for one
    request, which always may. A sweep of the encoder takes texts of `max_sweep_tokens` with their
    padding, at least one text. The first text waits up to `window_s` for others, unless nothing
    else is to be done. Outputs of the encoder are kept in up to `encoder_cache_bytes`, which are
    part of `cache_bytes`, at most half of them; 0 keeps none.
    """

    max_rows: int = 32
    max_sweep_tokens: int = 8192
    window_s: float = 0.01
    cache_bytes: int | None = None
    encoder_cache_bytes: int = 0

    def __post_init__(self) -> None:
        if min(self.max_rows, self.max_sweep_tokens) < 1:
            raise ValueError(f"{self}: counts must be at least 1, times not negative")
        if self.window_s < 0 or self.encoder_cache_bytes < 0:
            raise ValueError(f"{self}: counts must be at least 1, times and bytes not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the scheduler must know of a request.

    `key` is on whose account it runs: keys share the engine evenly by tokens, and within a key its
    adapters do. Higher `priority` goes first, whatever the shares. `deadline` is a time as
    `arrived` is. It takes `rows` of the batch; a search, which takes `own_bytes` of caches for
    itself, and tasks without caches are no rows of it; the latter hold `held_bytes` of their text.
    """

    source_tokens: int
    max_tokens: int
    arrived: float
    key: str = ""
    adapter: str = ""
    priority: int = 0
    deadline: float | None = None
    rows: int = 1
    own_bytes: int = 0
    held_bytes: int = 0
    is_row: bool = True

    @property
    def cost(self) -> int:
        """Tokens that it may take in all."""
        return self.source_tokens + self.rows * self.max_tokens


class _Name(NamedTuple):
    """Of a queue."""

    priority: int
    key: str
    adapter: str


T = TypeVar("T")
N = TypeVar("N", bound=Hashable)


class Scheduler(Generic[T]):
    """Waiting requests, in queues by priority, key and adapter; in each, first come, first served.

    Shares are counted twice, by key and by adapter within the key: so neither a key with many
    adapters nor an adapter with many requests gets more than others that wait beside it.
    Source: start-time fair queueing (Goyal et al. 1996), with tokens for bytes; who was idle earns
    nothing. With keys a (3 requests) and b (1), all alike, the order is a, b, a, a.
    `max_rows` and `max_sweep_tokens` are those of the limits, until memory has run out.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.max_rows = limits.max_rows
        self.max_sweep_tokens = limits.max_sweep_tokens
        self._queues: dict[_Name, deque[tuple[Demand, T]]] = {}
        self._by_key: dict[str, float] = {}  # tokens that were served
        self._by_adapter: dict[tuple[str, str], float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, demand: Demand, item: T) -> None:
        """Queue a request."""
        name = _Name(demand.priority, demand.key, demand.adapter)
        _enter(self._by_key, name.key, {other.key for other in self._queues})
        within = {other[1:] for other in self._queues if other.key == name.key}
        _enter(self._by_adapter, name[1:], within)
        self._queues.setdefault(name, deque()).append((demand, item))

    def lower_rows(self) -> None:
        """Let half as many rows decode together, at least one."""
        self.max_rows = max(self.max_rows // 2, 1)

    def lower_sweep(self, num_tokens: int) -> None:
        """Let a sweep take half of what was too much, with its padding."""
        self.max_sweep_tokens = max(min(num_tokens, self.max_sweep_tokens) // 2, 1)

    def recover(self) -> None:
        """Let in a little more again, if it was lowered: a row, and a row's share of a sweep."""
        most = self.limits
        share = -(-most.max_sweep_tokens // most.max_rows)
        self.max_rows = min(self.max_rows + 1, most.max_rows)
        self.max_sweep_tokens = min(self.max_sweep_tokens + share, most.max_sweep_tokens)

    def waiting(self) -> list[tuple[Demand, T]]:
        """All that wait; other threads may ask."""
        queues = list(self._queues.values())
        return [entry for queue in queues for entry in tuple(queue)]

    def count(self, is_meant: Callable[[T], bool]) -> int:
        """Waiting requests of which that is true; other threads may ask."""
        return sum(is_meant(item) for _, item in self.waiting())

    def drop(self, is_unwanted: Callable[[Demand, T], bool]) -> list[T]:
        """Take out all waiting requests of which that is true. Returns them."""
        dropped: list[T] = []
        for name, queue in list(self._queues.items()):
            if not any(is_unwanted(demand, item) for demand, item in queue):
                continue
            kept = deque[tuple[Demand, T]]()
            for demand, item in queue:
                if is_unwanted(demand, item):
                    dropped.append(item)
                else:
                    kept.append((demand, item))
            self._keep(name, kept)
        return dropped

    def next_sweep(
        self, now: float, running: int, has_room: Callable[[list[Demand]], bool] = lambda _: True
    ) -> list[T]:
        """Take the texts of the next sweep; none if it is better to wait, or no row is free.

        `running` rows are taken; `has_room` tells whether such requests can be added to those.
        """
        if not self._queues or (running and self._may_wait(now, self.max_rows - running)):
            return []

        def fits(together: list[Demand]) -> bool:
            return has_room(together) and (len(together) == 1 or self._is_small(together))

        return self._take(running, fits, lambda _: True)

    def next_ready(
        self, running: int, has_room: Callable[[list[Demand]], bool], is_ready: Callable[[T], bool]
    ) -> list[T]:
        """Take those whose turn it is as long as they need no sweep."""
        return self._take(running, has_room, is_ready)

    def wait_s(self, now: float) -> float:
        """How long the collecting of texts goes on at most; 0 if the time is over."""
        first = min((queue[0][0].arrived for queue in self._queues.values()), default=now)
        return max(first + self.limits.window_s - now, 0.0)

    def _take(
        self,
        running: int,
        fits: Callable[[list[Demand]], bool],
        is_meant: Callable[[T], bool],
    ) -> list[T]:
        chosen: list[Demand] = []
        items: list[T] = []
        while self._queues:
            name = self._next_queue()
            demand, item = self._queues[name][0]
            together = [*chosen, demand]
            rows = running + sum(one.rows for one in together)
            is_alone = not running and not chosen  # more beams than rows: nobody beside them
            if not is_meant(item) or (rows > self.max_rows and not is_alone) or not fits(together):
                break
            self._queues[name].popleft()
            self._keep(name, self._queues[name])
            self._by_key[name.key] += demand.cost
            self._by_adapter[name[1:]] += demand.cost
            chosen.append(demand)
            items.append(item)
        if not self._queues:
            self._by_key.clear()
            self._by_adapter.clear()
        return items

    def _is_small(self, demands: list[Demand]) -> bool:
        longest = max(demand.source_tokens for demand in demands)
        return longest * len(demands) <= self.max_sweep_tokens

    def _may_wait(self, now: float, free: int) -> bool:
        """Whether others may still come to share a sweep with those that wait."""
        tokens = sum(d.source_tokens for queue in self._queues.values() for d, _ in queue)
        is_full = len(self) >= free or tokens >= self.max_sweep_tokens
        return not is_full and self.wait_s(now) > 0

    def _next_queue(self) -> _Name:
        urgent = max(self._queues).priority
        names = [name for name in self._queues if name.priority == urgent]
        key = min(names, key=lambda name: (self._by_key[name.key], self._first(name))).key
        return min(
            (name for name in names if name.key == key),
            key=lambda name: (self._by_adapter[name[1:]], self._first(name)),
        )

    def _first(self, name: _Name) -> float:
        return self._queues[name][0][0].arrived

    def _keep(self, name: _Name, queue: deque[tuple[Demand, T]]) -> None:
        if queue:
            self._queues[name] = queue
        else:
            del self._queues[name]


def _enter(served: dict[N, float], name: N, waiting: Collection[N]) -> None:
    """Let a name wait beside others: level with the one that has been served least, or above it."""
    if name in waiting:
        return
    level = min((served[other] for other in waiting), default=0.0)
    served[name] = max(served.get(name, 0.0), level)
