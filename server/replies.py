"""From events of the engine to the choices, chunks and accounts of one completions request."""

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.request import Event, Failed, Finished, Piece, Request
from server.errors import ApiError, retry_headers
from server.health import RETRY_S
from server.logprobs import NameToken, join_logprobs, tell_logprobs
from server.schemas import Choice, Completion, Logprobs, Timings, Usage


@dataclass(slots=True)
class Transcript:
    """The text of one choice so far, by blanks; `num_blanks` 0 for plain continuation.

    The text is the blanks joined by line breaks, and what `add` and `close` return adds up to it:
    with 3 blanks the pieces (0, "a"), (2, "b") give "a", then two line breaks and "b".
    """

    num_blanks: int
    spans: list[str] = field(default_factory=list)
    end: Finished | None = None
    logprobs: list[Logprobs] = field(default_factory=list)
    num_shown: int = 0  # characters

    def _reach(self, blank: int) -> str:
        missing = blank + 1 - len(self.spans)
        gap = "\n" * (missing if self.spans else missing - 1)
        self.spans += [""] * missing
        return gap

    def add(self, piece: Piece) -> str:
        """Take in a piece; returns what it adds to the text. Blanks come in rising order."""
        gap = self._reach(piece.blank)
        self.spans[piece.blank] += piece.text
        self.num_shown += len(gap) + len(piece.text)
        return gap + piece.text

    def close(self, end: Finished) -> str:
        """Take in the end; returns what blanks without an answer add to the text."""
        self.end = end
        return self._reach(max(self.num_blanks, 1) - 1)


class Reply:
    """The reply to one HTTP request: `num_samples` choices for each prompt, in this order."""

    def __init__(
        self,
        reply_id: str,
        model: str,
        requests: Sequence[Request],
        num_samples: int,
        name_token: NameToken,
    ) -> None:
        self.id = reply_id
        self._model = model
        self._created = int(time.time())
        self._num_samples = num_samples
        self._name_token = name_token
        self._transcripts = [Transcript(request.num_blanks) for request in requests]

    def take(self, index: int, event: Event) -> Completion:
        """Take in an event of choice `index`; returns the chunk that tells it.

        Raises ApiError if the engine gave up the request.
        """
        transcript = self._transcripts[index]
        if isinstance(event, Piece):
            text = transcript.add(event)
            logprobs = None
            if event.logprobs:
                offset = transcript.num_shown - len(event.text)  # after the breaks between blanks
                logprobs = tell_logprobs(event.logprobs, offset, self._name_token)
                transcript.logprobs.append(logprobs)
            return self._message([Choice(index=index, text=text, logprobs=logprobs)])
        if isinstance(event, Failed):
            if event.is_shutdown:
                headers = retry_headers(RETRY_S)
                raise ApiError(503, event.message, code="shutting_down", headers=headers)
            raise ApiError(500, event.message, code="engine_failure")
        assert isinstance(event, Finished)  # no completion asks for anything else
        if event.reason == "cancelled":
            raise ApiError(500, "the request was cancelled", code="engine_failure")
        text = transcript.close(event)
        return self._message([self._last_choice(index, text)])

    def whole(self) -> Completion:
        """The reply in one piece, when all choices have ended."""
        transcripts = enumerate(self._transcripts)
        choices = [
            self._last_choice(i, "\n".join(t.spans), join_logprobs(t.logprobs))
            for i, t in transcripts
        ]
        return self._message(choices, self.usage(), self.timings())

    def usage_chunk(self) -> Completion:
        """The last chunk of a stream that was asked for accounts."""
        return self._message([], self.usage(), self.timings())

    def usage(self) -> Usage:
        """Accounts; the samples of one prompt share its tokens."""
        ends = [transcript.end for transcript in self._transcripts if transcript.end]
        assert len(ends) == len(self._transcripts)
        prompt_tokens = sum(end.prompt_tokens for end in ends[:: self._num_samples])
        completion_tokens = sum(end.completion_tokens for end in ends)
        return Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
        )

    def timings(self) -> Timings:
        """Where the time went; choices that waited together waited once."""
        ends = [transcript.end for transcript in self._transcripts if transcript.end]
        moved = [end.experts for end in ends if end.experts is not None]
        times = Timings(
            queued_ms=round(1000 * max(end.queued_s for end in ends), 3),
            encode_ms=round(1000 * sum(end.encode_s for end in ends), 3),
            decode_ms=round(1000 * sum(end.decode_s for end in ends), 3),
        )
        if not moved:
            return times
        counts = {
            "expert_hits": sum(stats.hits for stats in moved),
            "expert_misses": sum(stats.misses for stats in moved),
            "expert_bytes": sum(stats.read_bytes + stats.copied_bytes for stats in moved),
            "expert_stall_ms": round(1000 * sum(stats.stall_s for stats in moved), 3),
        }
        return times.model_copy(update=counts)

    def account(self) -> dict[str, object]:
        """What the log line tells of the reply."""
        usage, times = self.usage(), self.timings()
        moved = {name: value for name, value in times if value is not None and "expert" in name}
        reasons = sorted({t.end.reason for t in self._transcripts if t.end})
        return {
            "choices": len(self._transcripts),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish": ",".join(reasons),
            **moved,
        }

    def _last_choice(self, index: int, text: str, logprobs: Logprobs | None = None) -> Choice:
        transcript = self._transcripts[index]
        end = transcript.end
        assert end is not None
        assert end.reason != "cancelled"
        return Choice(
            index=index,
            text=text,
            logprobs=logprobs,
            finish_reason=end.reason,
            stop_reason=end.stop_reason,
            seed=end.seed,
            spans=transcript.spans if transcript.num_blanks else None,
        )

    def _message(
        self, choices: list[Choice], usage: Usage | None = None, timings: Timings | None = None
    ) -> Completion:
        return Completion(
            id=self.id,
            created=self._created,
            model=self._model,
            choices=choices,
            usage=usage,
            timings=timings,
        )


def new_id() -> str:
    """A fresh id of a completion."""
    return f"cmpl-{uuid.uuid4().hex}"
