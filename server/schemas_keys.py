"""One line of a keys file: who calls, what that caller may do, and how much of it."""

from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

Scope = Literal["infer", "tune", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = ("infer", "tune", "admin", "metrics")

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
PATTERN = r"^[A-Za-z0-9._@-]{0,128}\*?$"
Rate = Annotated[int, Field(ge=1, le=10**9)]
Pattern = Annotated[str, Field(pattern=PATTERN, min_length=1)]


class KeyRecord(BaseModel):
    """What is kept of a key: never the key itself. A limit of None is no limit.

    `adapters` None allows all, an empty list none; '*' at the end of a name stands for any rest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Annotated[str, Field(pattern=NAME)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    scopes: Annotated[tuple[Scope, ...], Field(min_length=1)] = ("infer",)
    requests_per_minute: Rate | None = None
    tokens_per_minute: Rate | None = None
    max_concurrent: Rate | None = None
    adapters: Annotated[tuple[Pattern, ...], Field(max_length=1000)] | None = None
    priority: Annotated[int, Field(ge=-100, le=100)] = 0
    expires: AwareDatetime | None = None
    created: AwareDatetime | None = None

    def has_expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.now(UTC) >= self.expires

    def may_use_adapter(self, name: str) -> bool:
        """Whether an adapter, by its name with or without a version, is on the list."""
        if self.adapters is None:
            return True
        plain = name.partition("@")[0]
        return any(matches(pattern, name) or matches(pattern, plain) for pattern in self.adapters)


def matches(pattern: str, name: str) -> bool:
    """Whether a name is the pattern, or begins with it where it ends in '*'."""
    if pattern.endswith("*"):
        return name.startswith(pattern[:-1])
    return name == pattern
