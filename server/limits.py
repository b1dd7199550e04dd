"""How much a key may ask for: by the minute and at once, and the headers that tell it."""

from collections.abc import Callable
from dataclasses import dataclass, field

from server.errors import ApiError, retry_headers
from server.schemas_keys import KeyRecord

CODE = "rate_limit_exceeded"
MINUTE_S = 60.0
BUSY_S = 1.0  # nobody knows when a request of the key ends

Clock = Callable[[], float]


class Bucket:
    """Holds up to `size`, which it gains back in a minute; a late bill may take it below zero."""

    def __init__(self, size: int, clock: Clock) -> None:
        self.size = size
        self._clock = clock
        self._level = float(size)
        self._filled_s = clock()

    def level(self) -> float:
        """What there is now."""
        now_s = self._clock()
        self._level = min(self.size, self._level + (now_s - self._filled_s) * self._rate)
        self._filled_s = now_s
        return self._level

    @property
    def _rate(self) -> float:
        return self.size / MINUTE_S

    def wait_s(self, amount: float) -> float:
        """How long until there is so much; at most a minute, if it is no more than the size."""
        return max(0.0, (amount - self.level()) / self._rate)

    def add(self, amount: float) -> None:
        """Give back, or take with a negative amount."""
        self._level = min(self.size, self.level() + amount)

    def headers(self, what: str) -> dict[str, str]:
        """What OpenAI's clients are told: the limit, what is left, when it is full again."""
        return {
            f"x-ratelimit-limit-{what}": str(self.size),
            f"x-ratelimit-remaining-{what}": str(max(0, int(self.level()))),
            f"x-ratelimit-reset-{what}": f"{self.wait_s(self.size):.3f}s",
        }


@dataclass(slots=True)
class Limits:
    """The live state of one key: its buckets (None: no limit) and its requests under way."""

    requests: Bucket | None = None
    tokens: Bucket | None = None
    max_concurrent: int | None = None
    running: int = field(default=0)

    def adjust(self, record: KeyRecord, clock: Clock) -> None:
        """Take over the limits of a record; a bucket whose size stays keeps its level."""
        self.requests = fitting(self.requests, record.requests_per_minute, clock)
        self.tokens = fitting(self.tokens, record.tokens_per_minute, clock)
        self.max_concurrent = record.max_concurrent

    def enter(self) -> None:
        """Count one more request. Raises ApiError (429)."""
        if self.max_concurrent is not None and self.running >= self.max_concurrent:
            text = (
                f"this key may have {self.max_concurrent} requests under way; wait for one to end"
            )
            raise refusal(text, BUSY_S, "concurrent")
        if self.requests is not None:
            if wait_s := self.requests.wait_s(1):
                text = f"this key may send {self.requests.size} requests in a minute"
                raise refusal(text, wait_s, "requests")
            self.requests.add(-1)
        self.running += 1

    def reserve(self, tokens: int) -> None:
        """Take tokens that a request may need. Raises ApiError (429)."""
        bucket = self.tokens
        if bucket is None:
            return
        if tokens > bucket.size:  # waiting does not help
            text = (
                f"the request may need {tokens} tokens (prompt and max_tokens) and this key has "
                f"{bucket.size} in a minute; shorten the prompt or lower max_tokens"
            )
            headers = {"x-should-retry": "false"}
            raise ApiError(429, text, code=CODE, headers=headers, limit="tokens")
        if wait_s := bucket.wait_s(tokens):
            text = (
                f"the request may need {tokens} tokens (prompt and max_tokens), of "
                f"{bucket.size} that this key has in a minute too few are left"
            )
            raise refusal(text, wait_s, "tokens")
        bucket.add(-tokens)

    def headers(self) -> dict[str, str]:
        """The x-ratelimit headers of what is limited."""
        told = {} if self.requests is None else self.requests.headers("requests")
        return told if self.tokens is None else {**told, **self.tokens.headers("tokens")}


def fitting(bucket: Bucket | None, size: int | None, clock: Clock) -> Bucket | None:
    """A bucket of a size: the present one if it has it."""
    if size is None or (bucket is not None and bucket.size == size):
        return None if size is None else bucket
    return Bucket(size, clock)


def refusal(text: str, wait_s: float, limit: str) -> ApiError:
    """An error that tells when to come back."""
    return ApiError(429, text, code=CODE, headers=retry_headers(wait_s), limit=limit)
