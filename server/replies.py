"""From events of the engine to parts of answers, and to the accounts of one HTTP request."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field

from engine.request import (
    Answer,
    Continuations,
    Event,
    Failed,
    Finished,
    Piece,
    PromptLogprobs,
    Request,
    Searched,
    TokenLogprob,
)
from engine.tokenizer import Tokenizer
from server.errors import ApiError, retry_headers
from server.health import RETRY_S
from server.parts import Order, Part, Spot
from server.schemas import PromptTokensDetails, Timings, Usage

SHOWN = ("stop", "length")


@dataclass(slots=True)
class Transcript:
    """The text of one request so far, by blanks; `num_blanks` 0 for plain continuation.

    The text is the echo, then the blanks joined by line breaks, and what `add` and `close` return
    adds up to it: with 3 blanks the pieces (0, "a"), (2, "b") give "a", then two line breaks, "b".
    """

    num_blanks: int
    echo: str = ""
    spans: list[str] = field(default_factory=list)
    end: Finished | None = None
    token_ids: list[int] = field(default_factory=list)
    spots: list[Spot] = field(default_factory=list)
    prompt: tuple[TokenLogprob, ...] | None = None
    answers: tuple[Answer, ...] = ()
    num_shown: int = 0  # characters
    num_echoed: int = 0  # of the spots
    has_begun: bool = False

    def _reach(self, blank: int) -> str:
        missing = blank + 1 - len(self.spans)
        gap = "\n" * (missing if self.spans else missing - 1)
        self.spans += [""] * missing
        return gap

    def begin(self) -> str:
        """The echo, the first time."""
        if self.has_begun:
            return ""
        self.has_begun = True
        self.num_shown = len(self.echo)
        return self.echo

    def add(self, piece: Piece) -> tuple[str, tuple[Spot, ...]]:
        """Take in a piece; returns what it adds to the text. Blanks come in rising order."""
        gap = "" if piece.blank < len(self.spans) else self._reach(piece.blank)
        self.spans[piece.blank] += piece.text
        self.token_ids += piece.token_ids
        offset = self.num_shown + len(gap)  # after the breaks between blanks
        self.num_shown = offset + len(piece.text)
        if not piece.logprobs:
            return gap + piece.text, ()
        spots = tuple(Spot(token, offset) for token in piece.logprobs)
        self.spots += spots
        return gap + piece.text, spots

    def close(self, end: Finished) -> str:
        """Take in the end; returns what blanks without an answer add to the text."""
        self.end = end
        return self._reach(max(self.num_blanks, 1) - 1)

    @property
    def text(self) -> str:
        """All of it."""
        return self.echo + "\n".join(self.spans)

    @property
    def mean_logprob(self) -> float:
        """Of the tokens that were generated; what best_of ranks by."""
        made = [spot.token.logprob for spot in self.spots[self.num_echoed :]]
        return sum(made) / len(made) if made else 0.0


class Reply:
    """Collects the events of one HTTP request and tells the parts of its choices."""

    def __init__(self, order: Order, tokenizer: Tokenizer) -> None:
        self.id = order.reply_id
        self._order = order
        self._tokenizer = tokenizer
        self._transcripts = [
            Transcript(request.num_blanks, self._echo_of(i))
            for i, request in enumerate(order.requests)
        ]

    def _echo_of(self, index: int) -> str:
        return self._order.echo[index // self._order.per_prompt] if self._order.echo else ""

    def take_text(self, index: int, piece: Piece) -> str | None:
        """Take in a piece that only adds text and ids; None, and nothing is done, if it does more.

        The short way of most tokens: `take` makes a part of them.
        """
        transcript = self._transcripts[index]
        if not transcript.has_begun or piece.logprobs or self._order.is_silent:
            return None
        return transcript.add(piece)[0]

    def take(self, index: int, event: Event) -> list[Part]:
        """Take in an event of request `index`; returns what it adds to the choices.

        Raises ApiError if the engine gave up the request.
        """
        transcript, request = self._transcripts[index], self._order.requests[index]
        if failed := failure_of(event):
            raise failed
        first = None if transcript.has_begun else request
        if isinstance(event, PromptLogprobs):
            transcript.prompt = event.tokens
            if not transcript.echo:
                return [Part(index=index, prompt=event.tokens)]
            text = transcript.begin()
            spots = tuple(place(event.tokens, self._tokenizer))
            transcript.spots += spots
            transcript.num_echoed = len(spots)
            return [Part(index=index, text=text, spots=spots, prompt=event.tokens, request=first)]
        echo = transcript.begin()
        if isinstance(event, Piece):
            if self._order.is_silent:
                return [Part(index=index, text=echo, request=first)] if first else []
            text, spots = transcript.add(event)
            return [
                Part(
                    index=index,
                    text=echo + text,
                    token_ids=event.token_ids,
                    spots=spots,
                    request=first,
                )
            ]
        if isinstance(event, Searched):
            transcript.answers = event.answers
            return []
        assert isinstance(event, Finished)  # no generation asks for anything else
        text = transcript.close(event)
        part = self._last(index, transcript)
        return [
            Part(
                index=index,
                text=echo + text,
                request=first,
                finish=part.finish,
                stop_reason=part.stop_reason,
                seed=part.seed,
                spans=part.spans,
            )
        ]

    def parts(self) -> list[Part]:
        """All choices, each in one part, when all requests have ended."""
        told: list[Part] = []
        for prompt in range(len(self._transcripts) // self._order.per_prompt):
            told += self._choices(prompt, len(told))
        return told

    def _choices(self, prompt: int, first: int) -> list[Part]:
        size, wanted = self._order.per_prompt, self._order.num_choices
        group = self._transcripts[prompt * size : (prompt + 1) * size]
        request = self._order.requests[prompt * size]
        if group[0].answers:
            end, echo = group[0].end, group[0].echo
            return [
                Part(
                    index=first + rank,
                    text=echo + answer.text,
                    token_ids=answer.token_ids,
                    prompt=group[0].prompt,
                    request=request,
                    finish=answer.reason,
                    stop_reason=answer.stop_reason,
                    seed=end.seed if end else None,
                    score=answer.score,
                )
                for rank, answer in enumerate(group[0].answers[:wanted])
            ]
        if wanted < size:
            group = sorted(group, key=lambda transcript: -transcript.mean_logprob)[:wanted]
        return [
            self._last(first + rank, transcript, request) for rank, transcript in enumerate(group)
        ]

    def _last(self, index: int, transcript: Transcript, request: Request | None = None) -> Part:
        end = transcript.end
        assert end is not None
        assert end.reason in SHOWN
        is_silent = self._order.is_silent
        return Part(
            index=index,
            text=transcript.text,
            token_ids=tuple(transcript.token_ids),
            spots=tuple(transcript.spots),
            prompt=transcript.prompt,
            request=request,
            finish="length" if is_silent else end.reason,
            stop_reason=None if is_silent else end.stop_reason,
            seed=end.seed,
            spans=tuple(transcript.spans) if transcript.num_blanks else None,
        )

    def usage(self) -> Usage:
        """Accounts so far; the samples of one prompt share its tokens."""
        prompts = self._order.requests[:: self._order.per_prompt]
        made = 0 if self._order.is_silent else sum(self._num_made(t) for t in self._transcripts)
        firsts = [transcript.end for transcript in self._transcripts[:: self._order.per_prompt]]
        return count_usage(prompts, made, sum(end.cached_tokens for end in firsts if end))

    def _num_made(self, transcript: Transcript) -> int:
        end = transcript.end
        return end.completion_tokens if end is not None else len(transcript.token_ids)

    def ends(self) -> list[Finished]:
        """The ends of all requests that have ended."""
        return [transcript.end for transcript in self._transcripts if transcript.end]

    def require_ends(self) -> None:
        """Raise ApiError if the events of a request stopped before its end."""
        if len(self.ends()) < len(self._transcripts):
            raise ApiError(500, "the engine ended in mid-request", code="engine_failure")

    def account(self, usage: Usage, times: Timings) -> dict[str, object]:
        """What the log line tells of the reply."""
        moved = {name: value for name, value in times if value is not None and "expert" in name}
        return {
            "choices": len(self._transcripts),
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "finish": ",".join(sorted({end.reason for end in self.ends()})),
            **moved,
        }


def failure_of(event: Event) -> ApiError | None:
    """What the client is told of a request that the engine gave up; None for other events."""
    if isinstance(event, Finished) and event.reason == "cancelled":
        return ApiError(500, "the request was cancelled", code="engine_failure")
    if not isinstance(event, Failed):
        return None
    if event.is_late:
        headers = {"x-should-retry": "false"}  # it would take as long again
        return ApiError(504, event.message, code="deadline_exceeded", headers=headers)
    if event.is_shutdown:
        headers = retry_headers(RETRY_S)
        return ApiError(503, event.message, code="shutting_down", headers=headers)
    return ApiError(500, event.message, code="engine_failure")


def count_usage(
    prompts: Sequence[Request], completion_tokens: int, cached_tokens: int = 0
) -> Usage:
    """Accounts of some prompts, each of which counts once."""
    encoder = sum(request.num_prompt_positions for request in prompts)
    decoder = sum(map(given_tokens, prompts))
    return Usage(
        prompt_tokens=encoder + decoder,
        completion_tokens=completion_tokens,
        total_tokens=encoder + decoder + completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            encoder_tokens=encoder, decoder_prompt_tokens=decoder, cached_tokens=cached_tokens
        ),
    )


def given_tokens(request: Request) -> int:
    """Tokens that the decoder reads and has not made; what is scored is read after each context."""
    given = len(request.decoder_ids)
    if isinstance(request.task, Continuations):
        return sum(given + len(choice) for choice in request.task.choices)
    return given


def tell_timings(ends: Sequence[Finished]) -> Timings:
    """Where the time went; requests that waited together waited once."""
    moved = [end.experts for end in ends if end.experts is not None]
    times = Timings(
        queued_ms=round(1000 * max((end.queued_s for end in ends), default=0.0), 3),
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


def place(tokens: Sequence[TokenLogprob], tokenizer: Tokenizer) -> list[Spot]:
    """Tokens with the character at which each begins; a token may hold half a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    offset, state = 0, 0
    spots = []
    for token in tokens:
        spots.append(Spot(token, offset))
        spelled, state = tokenizer.spell(token.token_id, state)
        offset += len(decoder.decode(spelled))
    return spots
