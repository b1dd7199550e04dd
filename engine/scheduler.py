"""Who goes into the encoder next: fair to all keys, urgent ones first, in time. No tensors here."""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much runs at once. Times in seconds.

    `max_rows` decode together, with caches of `cache_bytes` at most (None: no limit), but for one
    row, which always may. A sweep of the encoder takes texts of `max_sweep_tokens` with their
    padding, at least one text. The first text waits up to `window_s` for others, unless nothing
    else is to be done.
    """

    max_rows: int = 32
    max_sweep_tokens: int = 8192
    window_s: float = 0.01
    cache_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows < 1 or self.max_sweep_tokens < 1 or self.window_s < 0:
            raise ValueError(f"{self}: counts must be at least 1, times not negative")


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the scheduler must know of a request.

    `key` is whose turn it is (an API key, an adapter): keys share the engine evenly by tokens.
    Higher `priority` goes first, whatever the shares. `deadline` is a time as `arrived` is.
    """

    source_tokens: int
    max_tokens: int
    arrived: float
    key: str = ""
    priority: int = 0
    deadline: float | None = None

    @property
    def cost(self) -> int:
        """Tokens that it may take in all."""
        return self.source_tokens + self.max_tokens


T = TypeVar("T")


class Scheduler(Generic[T]):
    """Waiting requests, in a queue per key and priority; within one, first come, first served.

    Source: start-time fair queueing (Goyal et al. 1996), with tokens for bytes; an idle key earns
    nothing. With keys a (3 requests) and b (1), all alike, the order is a, b, a, a.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self._queues: dict[tuple[int, str], deque[tuple[Demand, T]]] = {}
        self._served: dict[str, float] = {}

    def __len__(self) -> int:
        return sum(map(len, self._queues.values()))

    def add(self, demand: Demand, item: T) -> None:
        """Queue a request."""
        if demand.key not in self._waiting_keys():
            level = min((self._served[key] for key in self._waiting_keys()), default=0.0)
            self._served[demand.key] = max(self._served.get(demand.key, 0.0), level)
        queue = self._queues.setdefault((demand.priority, demand.key), deque())
        queue.append((demand, item))

    def count(self, is_meant: Callable[[T], bool]) -> int:
        """Waiting requests of which that is true; other threads may ask."""
        queues = list(self._queues.values())
        return sum(is_meant(item) for queue in queues for _, item in tuple(queue))

    def drop(self, is_unwanted: Callable[[Demand, T], bool]) -> list[T]:
        """Take out all waiting requests of which that is true. Returns them."""
        dropped: list[T] = []
        for name, queue in list(self._queues.items()):
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

        `has_room` tells whether such requests can be added to those that run.
        """
        free = self.limits.max_rows - running
        if free <= 0 or not self._queues or (running and self._may_wait(now, free)):
            return []
        chosen: list[tuple[Demand, T]] = []
        while self._queues and len(chosen) < free:
            name = self._next_queue()
            demand, item = self._queues[name][0]
            together = [*(other for other, _ in chosen), demand]
            if not has_room(together) or (chosen and not self._is_small(together)):
                break
            self._queues[name].popleft()
            self._keep(name, self._queues[name])
            self._served[demand.key] += demand.cost
            chosen.append((demand, item))
        if not self._queues:
            self._served.clear()
        return [item for _, item in chosen]

    def wait_s(self, now: float) -> float:
        """How long the collecting of texts goes on at most; 0 if the time is over."""
        first = min((queue[0][0].arrived for queue in self._queues.values()), default=now)
        return max(first + self.limits.window_s - now, 0.0)

    def _is_small(self, demands: list[Demand]) -> bool:
        longest = max(demand.source_tokens for demand in demands)
        return longest * len(demands) <= self.limits.max_sweep_tokens

    def _may_wait(self, now: float, free: int) -> bool:
        """Whether others may still come to share a sweep with those that wait."""
        tokens = sum(d.source_tokens for queue in self._queues.values() for d, _ in queue)
        is_full = len(self) >= free or tokens >= self.limits.max_sweep_tokens
        return not is_full and self.wait_s(now) > 0

    def _next_queue(self) -> tuple[int, str]:
        return min(
            self._queues,
            key=lambda name: (-name[0], self._served[name[1]], self._queues[name][0][0].arrived),
        )

    def _waiting_keys(self) -> Iterable[str]:
        return {key for _, key in self._queues}

    def _keep(self, name: tuple[int, str], queue: deque[tuple[Demand, T]]) -> None:
        if queue:
            self._queues[name] = queue
        else:
            del self._queues[name]
