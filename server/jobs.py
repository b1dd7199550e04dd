"""One HTTP request on its way through the engine, in one piece or as server-sent events."""

import json
import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Protocol

import anyio
from fastapi.responses import Response
from pydantic import BaseModel

from engine.request import Event, Piece
from server.accounts import Bill
from server.errors import api_error
from server.frames import TextFrames
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
        self._forms = TextFrames(lambda part: wording.chunks(part, None))
        merge.count_by(self._see)

    async def whole(self) -> BaseModel:
        """Wait for all events. Raises ApiError if the engine gave up a request."""
        async for batch in self._merge.batches():
            for index, event in batch:
                self._reply.take(index, event)
        ending = self._close()
        parts = self._reply.parts()
        if sum(len(part.spots) for part in parts) < MANY_SPOTS:
            return self._wording.whole(parts, ending)
        return await anyio.to_thread.run_sync(self._wording.whole, parts, ending)

    async def frames(
        self, ping_s: float, *, has_closing: bool, is_continuous: bool
    ) -> AsyncIterator[bytes]:
        """The reply as server-sent events; failures are told in them, since the status is sent.

        Events that have come meanwhile go out in one piece: each piece costs a system call.
        """
        tell = self._tell_with_usage if is_continuous else self._tell
        held = bytearray()
        try:
            async for batch in self._merge.batches(ping_s):
                held += b"" if batch else PING
                for index, event in batch:
                    held += tell(index, event)
                    if len(held) > MAX_HELD_BYTES:
                        yield bytes(held)
                        held.clear()
                if held:
                    yield bytes(held)
                    held.clear()
            ending = self._close()
            if has_closing:
                held += data_frame(self._wording.closing(ending).model_dump_json())
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

    def _tell(self, index: int, event: Event) -> bytes:
        """Frames of what an event adds to the reply."""
        if isinstance(event, Piece) and (text := self._reply.take_text(index, event)) is not None:
            return self._forms.frame(index, text, event.token_ids)
        return self._tell_parts(index, event, None)

    def _tell_with_usage(self, index: int, event: Event) -> bytes:
        return self._tell_parts(index, event, self._reply.usage)

    def _tell_parts(self, index: int, event: Event, usage: Callable[[], Usage] | None) -> bytes:
        frames = bytearray()
        for part in self._reply.take(index, event):
            for chunk in self._wording.chunks(part, usage() if usage else None):
                frames += data_frame(chunk.model_dump_json())
        return bytes(frames)

    def _see(self, index: int, event: Event) -> None:
        """Count an event."""
        self._bill.add(self._meter.see(index, event))

    def _close(self) -> Ending:
        """Settle the accounts when all events have come. Raises ApiError if an end is missing."""
        self._reply.require_ends()
        usage, timings = self._reply.usage(), tell_timings(self._reply.ends())
        self._bill.generated = max(self._bill.generated, usage.completion_tokens)
        account = self._reply.account(usage, timings)
        self._notes.update(account, ttft_ms=self._meter.first_token_ms())
        receipt = self._receipt() if self._receipt else None
        return Ending(usage=usage, timings=timings, receipt=receipt)


def json_response(body: BaseModel, headers: Mapping[str, str]) -> Response:
    """A reply in one piece."""
    return Response(body.model_dump_json(), 200, dict(headers), media_type="application/json")
