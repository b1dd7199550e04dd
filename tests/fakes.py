"""Stand-ins for the slow parts: a tiny config, an engine that plays a script, a server for it."""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import uvicorn

from engine.adapters import Base
from engine.config import ModelConfig
from engine.errors import EngineStopped, Overloaded
from engine.model.transformer import Transformer
from engine.planning import MemoryPlan
from engine.progress import LoadProgress
from engine.request import Event, Failed, Finished, FinishReason, Piece, Request
from engine.stats import CacheStats, WorkStats
from engine.tokenizer import ByteTokenizer
from engine.worker import LoadedModel, Worker
from offload.pipeline import PipelineStats
from server.app import create_app
from server.lifecycle import open_socket
from server.settings import Settings
from tests.tiny import byte_tokenizer, tiny_model
from tests.waiting import wait_for

TINY_CONFIG = ModelConfig(
    vocab_size=ByteTokenizer.vocab_size,
    d_model=8,
    d_ff=16,
    d_kv=4,
    num_heads=2,
    num_encoder_layers=1,
    num_decoder_layers=1,
    tokenizer="bytes",
    pad_token_id=0,
    decoder_start_token_id=0,
    eos_token_ids=(1,),
)

FAKE_BASE = Base(
    config=TINY_CONFIG, dtype=torch.float32, device=torch.device("cpu"), fingerprint="fake"
)


class Hold:
    """In a script: wait here until the engine is released, drained or the stream is closed."""


HOLD = Hold()
Script = Callable[[Request], list[Event | Exception | Hold]]


def finished(request: Request, reason: FinishReason = "stop", num_tokens: int = 2) -> Finished:
    """The end of a request, with plausible accounts."""
    return Finished(
        reason=reason,
        stop_reason=None,
        prompt_tokens=len(request.encoder_ids),
        completion_tokens=num_tokens,
        seed=request.params.seed or 0,
        queued_s=0.0,
        encode_s=0.0,
        decode_s=0.0,
    )


def hello(request: Request) -> list[Event | Exception | Hold]:
    """A script: two pieces and the end."""
    return [Piece("Hel", (1,)), Piece("lo", (2,)), finished(request)]


@dataclass
class FakeStats:
    queued: int
    running: int
    experts: PipelineStats | None
    queued_tokens: int = 0
    requests: int = 0
    cancelled: int = 0
    failed: int = 0
    max_rows: int = 32
    stalled_s: float = 0.0
    encoder_cache: CacheStats = CacheStats(0, 0, 0)
    work: WorkStats = WorkStats()


class FakeStream:
    """Plays the events of one request."""

    def __init__(self, engine: "FakeEngine", request: Request) -> None:
        self._engine = engine
        self._request = request
        self._events = engine.script(request)
        self._loop = asyncio.get_running_loop()
        self._released = asyncio.Event()
        self._is_cut = False

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> Event:
        await asyncio.sleep(0)
        if self._events and isinstance(self._events[0], Hold):
            self._engine.held.set()
            await self._released.wait()
            self._events.pop(0)
        if self._is_cut:
            self._events.clear()
            self._is_cut = False
            return Failed("the server stopped before the request was finished", is_shutdown=True)
        if not self._events:
            raise StopAsyncIteration
        event = self._events.pop(0)
        if isinstance(event, Exception):
            raise event
        assert not isinstance(event, Hold)
        return event

    async def aclose(self) -> None:
        if self._events:
            self._engine.cancelled.append(self._request.request_id)
        self._engine.leave(self)

    def release(self, *, is_cut: bool = False) -> None:
        """Go on after HOLD, or end with Failed; from any thread."""
        self._is_cut = is_cut
        self._loop.call_soon_threadsafe(self._released.set)


class FakeEngine:
    """An engine without a model. `room` is how many requests fit at once."""

    def __init__(self, script: Script = hello, room: int = 1000) -> None:
        self.script = script
        self.room = room
        self.model_name = "org/tiny"
        self.config = TINY_CONFIG
        self.tokenizer = ByteTokenizer()
        self.adapter_base = FAKE_BASE
        self.state = "ready"
        self.phase = "ready"
        self.failure: str | None = None
        self.progress = LoadProgress()
        self.is_alive = True
        self.experts: PipelineStats | None = None
        self.plan: MemoryPlan | None = None
        self.fallbacks: tuple[str, ...] = ()
        self.submitted: list[Request] = []
        self.cancelled: list[str] = []
        self.held = threading.Event()
        self.idle = threading.Event()
        self._streams: list[FakeStream] = []

    def require_room(self, num_requests: int, num_tokens: int = 0, key: str = "") -> None:
        if len(self._streams) + num_requests > self.room:
            raise Overloaded("the queue is full", retry_after_s=2.5)

    def submit(self, request: Request) -> FakeStream:
        if self.state != "ready":
            raise EngineStopped(f"the engine is {self.state}")
        if len(self._streams) >= self.room:
            raise Overloaded("the queue is full", retry_after_s=2.5)
        self.submitted.append(request)
        stream = FakeStream(self, request)
        self._streams.append(stream)
        self.idle.clear()
        return stream

    def leave(self, stream: FakeStream) -> None:
        """Forget a stream; the last one to go sets `idle`."""
        self._streams.remove(stream)
        if not self._streams:
            self.idle.set()

    def release(self) -> None:
        """Let all streams go on that wait at HOLD."""
        for stream in list(self._streams):
            stream.release()

    def stats(self) -> FakeStats:
        return FakeStats(queued=0, running=len(self._streams), experts=self.experts)

    def drain(self, timeout_s: float) -> bool:
        self.state = "draining"
        is_idle = not self._streams or self.idle.wait(timeout_s)
        for stream in list(self._streams):
            stream.release(is_cut=True)
        self.state = "stopped"
        return is_idle


@contextlib.contextmanager
def live_server(engine: FakeEngine, **settings: object) -> Iterator[str]:
    """Serve an engine on a free port of the loopback device; yields the base address."""
    listener = open_socket("127.0.0.1", 0)
    port = listener.getsockname()[1]
    app = create_app(engine, Settings(**settings))
    config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@contextlib.contextmanager
def tiny_worker(model: Transformer | None = None, **options: object) -> Iterator[Worker]:
    """The real engine with a tiny model of random weights, ready; drained at the end."""
    loaded = LoadedModel(model or tiny_model(), byte_tokenizer())
    worker = Worker("tiny", lambda _: loaded, **options)
    worker.start()
    wait_for(lambda: worker.state not in ("starting", "loading"))
    try:
        yield worker
    finally:
        worker.drain(5.0)
