"""The way of a body to the engine: admitted, built in a thread, submitted, replied to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import anyio
from fastapi import Request as HttpRequest
from fastapi.responses import Response

from engine.errors import EngineError, Overloaded, RequestError
from engine.receipt import make_receipt
from engine.request import BeamParams, Event, Request
from server.accounts import Bill, Caller
from server.adapters import Adapters, Chosen, choose_adapter, with_defaults
from server.fields import check_fields, hash_user, ignored_header, is_on
from server.fingerprint import tell_fingerprint
from server.health import require_ready
from server.jobs import Job, Wording, json_response
from server.metrics import Meter, Metrics
from server.parts import Head, Order
from server.protocol import Engine, EventStream
from server.replies import Reply, failure_of, given_tokens
from server.schemas import Receipt, RoutedBody
from server.schemas_generation import GenerationBody
from server.settings import Settings
from server.streams import Merge, SseResponse, until_disconnect

BUILDER_THREADS = 2
MAX_WAITING = 64  # bodies that wait for a thread; each holds its texts
SHORT_BODY_BYTES = 2**10  # tokenized in 3 ms at worst
LONG_BODY_BYTES = 2**16  # tokenized in 0.2 s; 2 MB of text take ten

B = TypeVar("B", bound=RoutedBody)
B_co = TypeVar("B_co", bound=RoutedBody, covariant=True)
G = TypeVar("G", bound=GenerationBody)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Admission(Generic[B_co]):
    """A body that may be answered: with its adapter and what that presets, for a caller."""

    body: B_co
    chosen: Chosen
    sender: Caller | None
    priority: int
    deadline_s: float
    ignored: list[str]
    notes: dict[str, object]
    has_receipt: bool

    @property
    def caller(self) -> str:
        """On whose account it runs."""
        return self.sender.account if self.sender else ""

    def reserve(self, requests: Sequence[Request]) -> Bill | None:
        """Take what requests may need from the caller's tokens. Raises ApiError (429)."""
        if self.sender is None:
            return None
        prompts = sum(map(prompt_tokens, requests))
        adapter = self.chosen.adapter.name if self.chosen.adapter else None
        return self.sender.reserve(prompts, sum(map(most_tokens, requests)), adapter)

    @property
    def salt(self) -> str:
        """Whose encoder output may be shared: never another caller's."""
        return f"{self.caller}/{self.body.cache_salt or ''}"

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the reply."""
        return {**ignored_header(self.ignored), **self.chosen.headers}


class Gateway:
    """One engine, for all routes that ask it something."""

    def __init__(
        self, engine: Engine, settings: Settings, metrics: Metrics, adapters: Adapters | None
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.metrics = metrics
        self.adapters = adapters
        self._threads = anyio.CapacityLimiter(BUILDER_THREADS)
        self._long = anyio.CapacityLimiter(1)  # so that long bodies hold up each other only
        self._compilers = anyio.CapacityLimiter(1)  # takes seconds, and a process of its own

    async def admit(self, http: HttpRequest, body: B) -> Admission[B]:
        """Check who asks for what. Raises ApiError, Overloaded or EngineStopped."""
        require_ready(self.engine)
        ignored = check_fields(http, body, is_strict=self.settings.strict_fields)
        state = http.scope["state"]
        caller = state.get("caller")
        chosen = await choose_adapter(
            self.adapters,
            self.engine,
            model=body.model,
            adapter=body.adapter,
            adapter_id=body.adapter_id,
            caller=caller,
        )
        if chosen.reference is not None:
            state["notes"]["adapter"] = chosen.reference
        if body.user is not None:
            state["notes"]["user"] = hash_user(body.user)
        return Admission(
            with_defaults(body, chosen.defaults),
            chosen,
            caller,
            rank(body.priority, caller.priority if caller is not None else None),
            min(body.timeout or self.settings.request_timeout_s, self.settings.request_timeout_s),
            ignored,
            state["notes"],
            bool(getattr(body, "receipt", False)) or is_on(http, "x-receipt"),
        )

    async def build(
        self,
        http: HttpRequest,
        work: Callable[[], T],
        prompt_field: str = "prompt",
        *,
        is_quick: bool = False,
    ) -> T:
        """Result of tokenizing and the like, which on the event loop would hold up all streams.

        With `is_quick`, nothing but the length of a body can make it slow: of a short one it is
        done at once, as the way to a thread and back takes longer. Raises Overloaded if too many
        wait for a thread. A RequestError of the engine about a prompt names `prompt_field`, as the
        route calls it.
        """
        num_bytes = http.scope["state"].get("body_bytes", LONG_BODY_BYTES)
        try:
            if is_quick and num_bytes <= SHORT_BODY_BYTES:
                return work()
            is_long = num_bytes > LONG_BODY_BYTES
            return await self._in_thread(http, work, self._long if is_long else self._threads)
        except RequestError as error:
            if error.field == "prompt":
                error.field = prompt_field
            raise

    async def compile(self, http: HttpRequest, work: Callable[[], T]) -> T:
        """The same for grammars, which take longer and must hold up nobody else."""
        return await self._in_thread(http, work, self._compilers)

    async def _in_thread(
        self, http: HttpRequest, work: Callable[[], T], threads: anyio.CapacityLimiter
    ) -> T:
        if threads.statistics().tasks_waiting >= MAX_WAITING:
            raise Overloaded("too many requests are being read; try again later", 1.0)
        done = anyio.to_thread.run_sync(work, limiter=threads)
        if threads.available_tokens >= 1:
            return await done
        return await until_disconnect(http.receive, done)  # who goes gives up the place

    async def submit(self, requests: Sequence[Request]) -> Merge:
        """Hand all requests to the engine, or none. Raises Overloaded or EngineStopped."""
        streams: list[EventStream] = []
        try:
            for request in requests:
                streams.append(self.engine.submit(request))
        except EngineError:  # all or none
            for stream in streams:
                await stream.aclose()
            raise
        return Merge(streams)

    def require_room(self, num_requests: int, admission: Admission[B]) -> None:
        """Refuse at once, before any work on a text, what the queue has no room for.

        Raises Overloaded or EngineStopped.
        """
        self.engine.require_room(num_requests, key=admission.caller)

    def head(self, reply_id: str, chosen: Chosen, asked: str | None) -> Head:
        """What the messages of a reply begin with; the model goes by the name it was asked by."""
        fingerprint = tell_fingerprint(self.engine)
        return Head(
            id=reply_id,
            model=asked or chosen.model,
            fingerprint=fingerprint,
            adapter=chosen.reference,
        )

    async def answer(
        self, http: HttpRequest, order: Order, admission: Admission[G], wording: Wording
    ) -> Response:
        """Carry out an order and reply, in one piece or as an event stream."""
        body = admission.body
        admission.notes["completion"] = order.reply_id
        bill = admission.reserve(order.requests)
        merge = await self.submit(order.requests)
        reply = Reply(order, self.engine.tokenizer)

        def tell_receipt() -> Receipt:
            return self._receipt(order, reply, admission)

        receipt = tell_receipt if admission.has_receipt else None
        meter = Meter(self.metrics, order.requests, http.scope["state"])
        job = Job(reply, wording, merge, meter, admission.notes, receipt, bill)
        if body.stream:
            frames = job.frames(
                self.settings.keep_alive_s,
                has_closing=admission.has_receipt or body.has_usage,
                is_continuous=body.has_continuous_usage,
            )
            return SseResponse(merge, frames, admission.headers)
        async with merge:
            whole = await until_disconnect(http.receive, job.whole())
        return json_response(whole, admission.headers)

    def _receipt(self, order: Order, reply: Reply, admission: Admission[G]) -> Receipt:
        ends = reply.ends()
        told = make_receipt(
            order.requests[0],
            ends[0],
            model_fingerprint=self.engine.adapter_base.fingerprint,
            is_batch_invariant=self.settings.invariant,
        )
        ours: dict[str, object] = {
            "model": self.engine.model_name,
            "fingerprint": tell_fingerprint(self.engine),
            "seeds": [end.seed for end in ends],
            "ignored_fields": admission.ignored,
        }
        return Receipt.model_validate({**told, **ours})

    async def collect(
        self, http: HttpRequest, requests: Sequence[Request], admission: Admission[B]
    ) -> list[list[Event]]:
        """The events of requests that make no text, when all have ended.

        Raises ApiError if the engine gave up one of them or the caller has no tokens left for them,
        ClientDisconnect if the client went.
        """
        admission.reserve(requests)
        merge = await self.submit(requests)
        merge.count_by(Meter(self.metrics, requests, http.scope["state"]).see)
        told: list[list[Event]] = [[] for _ in requests]

        async def wait() -> None:
            async for batch in merge.batches():
                for index, event in batch:
                    told[index].append(event)
                    if failed := failure_of(event):
                        raise failed

        async with merge:
            await until_disconnect(http.receive, wait())
        admission.notes["choices"] = len(requests)
        return told


def rank(asked: int | None, most: int | None) -> int:
    """What priority a request gets: what it asked for, but not above that of its key."""
    if most is None:
        return asked or 0
    return most if asked is None else min(asked, most)


def prompt_tokens(request: Request) -> int:
    """Tokens that a request has read: by the encoder, and by the decoder what it is given."""
    return request.num_prompt_positions + given_tokens(request)


def most_tokens(request: Request) -> int:
    """Tokens that a request may make."""
    if request.task is None:
        return request.params.max_tokens
    if isinstance(request.task, BeamParams):
        return request.params.max_tokens * request.task.num_beams
    return 0
