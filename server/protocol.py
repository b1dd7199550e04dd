"""What the server needs of an engine: `engine.worker.Worker`, or a fake in the tests."""

from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Literal, Protocol

from engine.adapters import Base
from engine.config import ModelConfig
from engine.progress import LoadProgress
from engine.request import Event, Request
from engine.stats import CacheStats, WorkStats
from engine.tokenizer import Tokenizer

EngineState = Literal["starting", "loading", "ready", "draining", "failed", "stopped"]


class ExpertStats(Protocol):
    """Counts of offloaded experts since the start: see `offload.pipeline.PipelineStats`."""

    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...
    @property
    def evictions(self) -> int: ...
    @property
    def read_bytes(self) -> int: ...
    @property
    def host_loads(self) -> int: ...
    @property
    def copied_bytes(self) -> int: ...
    @property
    def prefetched(self) -> int: ...
    @property
    def prefetch_used(self) -> int: ...
    @property
    def prefetch_wasted(self) -> int: ...
    @property
    def stall_s(self) -> float: ...


class EngineStats(Protocol):
    """A snapshot of the load and counts since the start: see `engine.stats.EngineStats`."""

    @property
    def experts(self) -> ExpertStats | None: ...

    @property
    def queued(self) -> int: ...
    @property
    def queued_tokens(self) -> int: ...
    @property
    def running(self) -> int: ...
    @property
    def requests(self) -> int: ...
    @property
    def cancelled(self) -> int: ...
    @property
    def failed(self) -> int: ...
    @property
    def max_rows(self) -> int: ...
    @property
    def stalled_s(self) -> float: ...
    @property
    def encoder_cache(self) -> CacheStats: ...
    @property
    def work(self) -> WorkStats: ...


class EventStream(Protocol):
    """Events of one request: pieces, then exactly one Finished or Failed; `aclose` cancels it.

    Not an async generator: one that was never started runs no `finally` when it is closed. One
    that can `listen`, as `engine.ticket.Ticket` does, calls somebody and is read without a task.
    The message of Failed is shown to the client.
    """

    def __aiter__(self) -> AsyncIterator[Event]: ...
    def __anext__(self) -> Awaitable[Event]: ...
    def aclose(self) -> Awaitable[None]: ...


class Plan(Protocol):
    """How memory is shared out: bytes of each part by name, and all of it in JSON's types."""

    def parts(self) -> Mapping[str, int]: ...
    def facts(self) -> Mapping[str, object]: ...


class Engine(Protocol):
    """One model behind a queue. `config` and `tokenizer` are there once `state` is ready.

    `phase` tells in words what loading is at and `progress` in bytes, `failure` why the state is
    failed, `fallbacks` what works in a slower way than it should. `plan` is None where there is
    none, or none yet.
    """

    @property
    def model_name(self) -> str: ...
    @property
    def config(self) -> ModelConfig: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def adapter_base(self) -> Base: ...
    @property
    def state(self) -> EngineState: ...
    @property
    def phase(self) -> str: ...
    @property
    def progress(self) -> LoadProgress: ...
    @property
    def failure(self) -> str | None: ...
    @property
    def plan(self) -> Plan | None: ...
    @property
    def fallbacks(self) -> tuple[str, ...]: ...

    def require_room(self, num_requests: int, num_tokens: int = 0, key: str = "") -> None:
        """Raise what `submit` would if so many requests, of so many tokens in all, came now.

        To be asked before work is put into them; nothing is reserved.
        """
        ...

    def submit(self, request: Request) -> EventStream:
        """Queue a request without waiting. Raises RequestError, Overloaded or EngineStopped."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread goes on; where it does though the state is failed, it hangs."""
        ...

    def stats(self) -> EngineStats:
        """The present load; cheap, callable from any thread."""
        ...

    def drain(self, timeout_s: float) -> bool:
        """Accept nothing more, finish the rest, block until then. False if time ran out.

        Requests that are left after `timeout_s` end with Failed.
        """
        ...
