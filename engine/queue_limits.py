"""How much may wait: requests and tokens, of all and of one key."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Waiting(NamedTuple):
    """A request that waits, or that wants to."""

    key: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueLimits:
    """Bounds of the queue; `max_tokens` None bounds requests only.

    One request may always wait, however long. A named key may take as much as it leaves free: half
    of the queue alone, a third beside another that does the same; so a place is left for whoever
    comes next. Its first request needs but a place. Without a name all of the queue may be taken.
    Source: dynamic queue thresholds (Choudhury and Hahne, 1998), with a factor of 1.
    """

    max_requests: int = 64
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        if self.max_requests < 1 or (self.max_tokens is not None and self.max_tokens < 1):
            raise ValueError(f"{self}: bounds must be at least 1")

    def find_refusal(self, waiting: Sequence[Waiting], wanted: Sequence[Waiting]) -> str | None:
        """Why requests of one key cannot wait beside others; None if they can."""
        if not wanted:
            return None
        key = wanted[0].key
        own = [one for one in waiting if one.key == key] if key else []
        reason = self._beyond("requests", len(waiting), len(own), len(wanted), self.max_requests)
        if reason is None and self.max_tokens is not None and waiting:
            tokens = [sum(one.num_tokens for one in some) for some in (waiting, own, wanted)]
            reason = self._beyond("tokens", *tokens, self.max_tokens)  # type: ignore[call-arg]
        if reason is None:
            return None
        return f"{len(waiting)} requests are waiting already, and {reason}; try again later"

    def _beyond(self, what: str, waiting: int, own: int, wanted: int, most: int) -> str | None:
        if waiting + wanted > most:
            return f"at most {most} {what} may wait ({waiting} do, {wanted} more came)"
        if own and own + wanted > most - waiting:
            return f"{own} {what} of this key, of which there may be {(most - waiting + own) // 2}"
        return None
