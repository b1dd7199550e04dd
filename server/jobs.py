"""One HTTP request on its way through the engine, in one piece or as server-sent events."""

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

import anyio
from fastapi.responses import Response
from pydantic import BaseModel

from engine.request import Piece
from server.accounts import Bill
from server.errors import api_error
from server.metrics import Meter
from server.parts import Ending, Part
from server.replies import Reply, tell_timings
from server.schemas import Receipt, Usage
from server.streams import DONE, PING, Merge, data_frame

logger = logging.getLogger(__name__)

MAX_HELD_BYTES = 16 * 2**10

MANY_SPOTS = 256  # log-probabilities, each with up to 20 others: more take long to tell


class Wording(Protocol):
    """How a route words the parts of a reply."""

    def chunks(self, part: Part, usage: Usage | None) -> Sequence[BaseModel]:
        """What a stream tells of some new part, with the usage so far if it was asked for."""
        ...

    def closing(self, ending: Ending) -> BaseModel:
        """The last chunk of a stream that was asked for accounts."""
        ...

    def whole(self, parts: Sequence[Part], ending: Ending) -> BaseModel:
        """The reply in one piece."""
        ...


class Job:
    """Reads the events of one HTTP request and words them; `receipt` is None unless asked for."""

    def __init__(
        self,
        reply: Reply,
        wording: Wording,
        merge: Merge,
        meter: Meter,
        notes: dict[str, object],
        receipt: Callable[[], Receipt] | None = None,
        bill: Bill | None = None,
    ) -> None:
        self._reply = reply
        self._wording = wording
        self._merge = merge
        self._meter = meter
        self._notes = notes
        self._receipt = receipt
        self._bill = bill or Bill()

    async def whole(self) -> BaseModel:
        """Wait for all events. Raises ApiError if the engine gave up a request."""
        async for _ in self._parts():
            pass
        parts, ending = self._reply.parts(), self._ending()
        if sum(len(part.spots) for part in parts) < MANY_SPOTS:
            return self._wording.whole(parts, ending)
        return await anyio.to_thread.run_sync(self._wording.whole, parts, ending)

    async def frames(
        self, ping_s: float, *, has_closing: bool, is_continuous: bool
    ) -> AsyncIterator[bytes]:
        """The reply as server-sent events; failures are told in them, since the status is sent.

        Events that have come meanwhile go out in one piece: each piece costs a system call.
        """
        held = bytearray()
        try:
            async for part in self._parts(ping_s):
                if part is None:
                    held += PING
                else:
                    usage = self._reply.usage() if is_continuous else None
                    for chunk in self._wording.chunks(part, usage):
                        held += data_frame(chunk.model_dump_json())
                if len(held) > MAX_HELD_BYTES or not self._merge.has_waiting():
                    yield bytes(held)
                    held.clear()
            if has_closing:
                held += data_frame(self._wording.closing(self._ending()).model_dump_json())
        except Exception as error:
            problem = api_error(error)
            self._notes["error"] = problem.code
            if problem.status == 500:
                logger.warning("%s: %s", self._reply.id, error)
            yield bytes(held) + data_frame(json.dumps(problem.body())) + DONE
            if problem.code == "internal_error":  # a bug: the log needs its traceback
                raise
        else:
            yield bytes(held) + DONE

    def _ending(self) -> Ending:
        return Ending(
            usage=self._reply.usage(),
            timings=tell_timings(self._reply.ends()),
            receipt=self._receipt() if self._receipt else None,
        )

    async def _parts(self, ping_s: float | None = None) -> AsyncIterator[Part | None]:
        async for item in self._merge.events(ping_s):
            if item is None:
                yield None
                continue
            index, event = item
            self._meter.see(index, event)
            if isinstance(event, Piece):
                self._bill.generated += len(event.token_ids)
            for part in self._reply.take(index, event):
                yield part
        self._reply.require_ends()
        usage = self._reply.usage()
        self._bill.generated = max(self._bill.generated, usage.completion_tokens)
        self._notes.update(self._reply.account(), ttft_ms=self._meter.first_token_ms())


def json_response(body: BaseModel, headers: Mapping[str, str]) -> Response:
    """A reply in one piece."""
    return Response(body.model_dump_json(), 200, dict(headers), media_type="application/json")
