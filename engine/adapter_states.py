"""What is known of the adapters of a directory: to the outside, and between looks."""

import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from engine.adapter_folders import Signature

State = Literal["discovered", "loading", "resident", "pinned", "evicted", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterInfo:
    """What is known of one version; `version` is None for a plain folder that was not read yet.

    Times are seconds since 1970. `nbytes` counts the vectors in memory, also of an evicted one.
    """

    name: str
    version: str | None
    state: State = "discovered"
    is_current: bool = False
    is_pinned: bool = False
    reason: str | None = None
    nbytes: int | None = None
    num_vectors: int | None = None
    sha256: str | None = None
    uses: int = 0
    last_used: float | None = None
    loaded_at: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreSnapshot:
    """Counts since the start and the present memory, for metrics."""

    names: int
    resident: int
    pinned: int
    used_bytes: int
    limit_bytes: int
    loads: int
    failures: int


@dataclass(slots=True, eq=False)
class Version:
    """A folder, and what came of reading it."""

    key: str  # its folder; PLAIN: known only after reading
    path: Path
    version: str | None
    good: Signature | None = None  # of the files that were read
    bad: tuple[Signature, float] | None = None  # of those that could not be, and when
    seen: tuple[Signature, float] | None = None
    reason: str | None = None
    is_loading: bool = False
    nbytes: int | None = None
    num_vectors: int | None = None
    sha256: str | None = None
    uses: int = 0
    last_used: float | None = None
    loaded_at: float | None = None


@dataclass(slots=True, eq=False)
class Entry:
    """All versions of a name, the preferred one first."""

    name: str
    changed_ns: int | None = None  # None: the folder has not been listed
    versions: dict[str, Version] = field(default_factory=dict)
    current: Version | None = None
    contents: dict[str, str] = field(default_factory=dict)  # checksum of each version once read
    reading: threading.Lock = field(default_factory=threading.Lock)
