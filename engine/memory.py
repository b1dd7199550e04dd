"""What this process may use: limits of its memory groups, what is free now, what it has already.

Source: Linux, Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst; proc(5).
"""

import ctypes
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from engine.cgroup import own_groups
from engine.errors import ConfigError
from engine.units import format_bytes

SHARE = 0.8  # of what is to be had now, if no budget is given; the rest is for what else runs
MACHINE = "the machine"
LARGE_BYTES = 8 * 2**20
M_MMAP_THRESHOLD = -3  # of mallopt(3)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostMemory:
    """Bytes of host memory: `limited_by` allows `limit_bytes` in all.

    `available_bytes` could be taken now without swapping, on top of `own_bytes`, which this process
    has already.
    """

    limit_bytes: int
    limited_by: str
    available_bytes: int
    own_bytes: int

    @property
    def usable_bytes(self) -> int:
        """The most that this process could have in all as things are."""
        return min(self.limit_bytes, self.available_bytes + self.own_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuMemory:
    """Bytes of a GPU."""

    free_bytes: int
    total_bytes: int


class _Group(NamedTuple):
    """A limit, and how much below it is left if page cache is given back."""

    name: str
    limit_bytes: int
    available_bytes: int


class _Names(NamedTuple):
    """What the files of a memory group are called, and the lines of its page cache."""

    limit: str
    usage: str
    cache: tuple[str, str]


NAMES = {
    1: _Names(
        "memory.limit_in_bytes",
        "memory.usage_in_bytes",
        ("total_active_file", "total_inactive_file"),
    ),
    2: _Names("memory.max", "memory.current", ("active_file", "inactive_file")),
}


def return_large_blocks() -> None:
    """Have glibc give every freed block of LARGE_BYTES and more back to the system at once.

    Left to itself it soon keeps blocks of up to 32 MiB: 16 texts of 2,001 tokens, one after the
    other, then took 2,290 MiB where 2,039 were planned, and 2,052 with this. With another C
    library nothing happens.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def return_free_heap() -> None:
    """Have glibc give back what is free between blocks that are in use; with another C library: no.

    Packing a 248 MB model leaves 30 to 95 MB of such holes.
    """
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def host_memory(root: Path = Path("/")) -> HostMemory:
    """Read the limits that hold for this process: the machine's, its memory group's, all above it.

    `root` is where /proc and /sys are looked for.
    Raises OSError if /proc cannot be read.
    """
    info = _table((root / "proc/meminfo").read_text())
    machine = _Group(MACHINE, info["MemTotal:"] * 1024, info["MemAvailable:"] * 1024)
    groups = [machine, *_groups(root)]
    tightest = min(groups, key=lambda group: group.limit_bytes)
    return HostMemory(
        limit_bytes=tightest.limit_bytes,
        limited_by=tightest.name,
        available_bytes=max(min(group.available_bytes for group in groups), 0),
        own_bytes=resident_bytes(root),
    )


def resident_bytes(root: Path = Path("/")) -> int:
    """Memory that this process has now. Raises OSError if /proc cannot be read."""
    pages = (root / "proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def own_pages_bytes(root: Path = Path("/")) -> int:
    """The part of it that no other process shares, as it does the code of libraries.

    Raises OSError if /proc cannot be read.
    """
    pages, shared = (root / "proc/self/statm").read_text().split()[1:3]
    return (int(pages) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def gpu_memory() -> GpuMemory:
    """Memory of torch's current GPU, of which there must be one; its context is made if need be."""
    free, total = torch.cuda.mem_get_info()
    return GpuMemory(free_bytes=free, total_bytes=total)


def host_budget(asked: int | None, host: HostMemory) -> int:
    """The budget that was asked for, or a share of what is to be had now.

    Raises ConfigError if more is asked for than this process may ever have.
    """
    if asked is None:
        return int(SHARE * host.usable_bytes)
    if asked > host.limit_bytes:
        raise ConfigError(
            f"a memory budget of {format_bytes(asked)} is more than {host.limited_by} allows: "
            f"{format_bytes(host.limit_bytes)} ({host.limit_bytes} bytes)"
        )
    return asked


def gpu_budget(asked: int, gpu: GpuMemory, context_bytes: int) -> int:
    """The budget that was asked for; `context_bytes` of it this process may have taken already.

    Raises ConfigError if the GPU has not so much left.
    """
    left = min(gpu.free_bytes + context_bytes, gpu.total_bytes)
    if asked > left:
        raise ConfigError(
            f"a GPU budget of {format_bytes(asked)} is more than the device has left: "
            f"{format_bytes(left)} of {format_bytes(gpu.total_bytes)}"
        )
    return asked


def _groups(root: Path) -> Iterator[_Group]:
    """The memory group of this process and those above it, as far as they are to be seen."""
    for place in own_groups(root, "memory"):
        shown = place.directory.relative_to(root)
        group = _read_group(place.directory, NAMES[place.version], shown)
        if group is not None:
            yield group


def _read_group(directory: Path, names: _Names, shown: Path) -> _Group | None:
    """A group's limit and what is left; None if it has none ('max'), or is not to be seen.

    "Unlimited" of version 1 is a number near 2**63, which never is the tightest.
    """
    try:
        text = (directory / names.limit).read_text().strip()
        if text == "max":
            return None
        limit_bytes = int(text)
        usage = int((directory / names.usage).read_text())
        stat = _table((directory / "memory.stat").read_text())
    except (OSError, ValueError):  # sandboxes imitate these files, more or less
        return None
    cache = sum(stat.get(name, 0) for name in names.cache)
    return _Group(f"the memory group /{shown}", limit_bytes, limit_bytes - usage + cache)


def _table(text: str) -> dict[str, int]:
    """Lines of a name and a number."""
    rows = (line.split()[:2] for line in text.splitlines() if line.strip())
    return {name: int(number) for name, number in rows}
