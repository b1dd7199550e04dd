"""What routes and replies hand each other: orders, parts of answers, what is told beside them."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from engine.request import FinishReason, Request, TokenLogprob
from server.schemas import Receipt, Timings, Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What one body asked of the engine: `per_prompt` requests each, in this order.

    Of the samples of a prompt, the `num_choices` best are told. `echo` is what every text begins
    with; with `is_silent` nothing that is generated is told.
    """

    reply_id: str
    requests: Sequence[Request]
    per_prompt: int = 1
    num_choices: int = 1
    echo: tuple[str, ...] = ()  # by prompt
    is_silent: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """What every message of a reply begins with."""

    id: str
    model: str
    fingerprint: str
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def facts(self) -> dict[str, object]:
        """The fields that all replies have."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "adapter": self.adapter,
        }


@dataclass(frozen=True, slots=True)
class Spot:
    """A token of a text with its log-probability; its text begins at character `offset`."""

    token: TokenLogprob
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some of one choice, or all of it. The last part has a `finish`; `request` is in the first."""

    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    spots: tuple[Spot, ...] = ()
    prompt: tuple[TokenLogprob, ...] | None = None
    request: Request | None = None
    finish: FinishReason | None = None
    stop_reason: str | int | None = None
    seed: int | None = None
    score: float | None = None
    spans: tuple[str, ...] | None = None

    @property
    def shown_finish(self) -> Literal["stop", "length"] | None:
        """The reason that clients know; who was cancelled gets a failure instead."""
        assert self.finish != "cancelled"
        return self.finish


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """What a reply tells beside its text."""

    usage: Usage | None
    timings: Timings | None = None
    receipt: Receipt | None = None

    def facts(self) -> dict[str, object]:
        """The fields that all replies have."""
        return {"usage": self.usage, "timings": self.timings, "receipt": self.receipt}
