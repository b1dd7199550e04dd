"""A memory limit for a child process that counts its page cache too: a nested memory cgroup.

Resource limits count address space and miss the page cache, so they can neither hold an engine that
maps its files to a budget nor leave it alone. The group lies below that of this process, which
stays in its own: nothing leaves the accounting that it came with.

Source: Linux, Documentation/admin-guide/cgroup-v1/memory.rst and cgroup-v2.rst.
"""

import contextlib
import errno
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

PREFIX = "infmoe-bench-"
REMOVE_TRIES = 50
REMOVE_WAIT_S = 0.05


class LimitUnavailable(Exception):
    """No memory group can be made here; the message tells why."""


class Files(NamedTuple):
    """What the files of a memory group are called."""

    limit: str
    peak: str
    no_swap: str


FILES = {
    1: Files("memory.limit_in_bytes", "memory.max_usage_in_bytes", "memory.swappiness"),
    2: Files("memory.max", "memory.peak", "memory.swap.max"),
}


class Place(NamedTuple):
    """A group that a process is in, and the version of its hierarchy."""

    directory: Path
    version: int


class MemoryGroup:
    """A group with a limit in bytes."""

    def __init__(self, directory: Path, version: int) -> None:
        self.directory = directory
        self._files = FILES[version]

    def set_limit(self, limit_bytes: int) -> None:
        """Limit memory and page cache together, and keep the group from swapping."""
        (self.directory / self._files.limit).write_text(str(limit_bytes))
        with contextlib.suppress(OSError):  # a kernel without swap lacks the file
            (self.directory / self._files.no_swap).write_text("0")

    def add(self, pid: int) -> None:
        """Move a process in; what it allocates and reads from now on counts."""
        (self.directory / "cgroup.procs").write_text(str(pid))

    def peak_bytes(self) -> int | None:
        """The most memory that the group held, page cache included; None if it is not told."""
        try:
            return int((self.directory / self._files.peak).read_text())
        except OSError:  # memory.peak came with Linux 5.19
            return None

    def remove(self) -> None:
        """Let go of the page cache and remove the group; its processes must have ended."""
        with contextlib.suppress(OSError):  # version 1 only
            (self.directory / "memory.force_empty").write_text("0")
        for _ in range(REMOVE_TRIES):
            try:
                self.directory.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                time.sleep(REMOVE_WAIT_S)  # the kernel takes a moment to let go of the dead
            else:
                return
        raise TimeoutError(f"{self.directory}: is still in use and could not be removed")


@contextmanager
def limited_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a memory group below the one of this process; it is removed afterwards, come what may.

    Raises LimitUnavailable if that is not possible or not permitted here.
    """
    place = own_place()
    if place is None:
        raise LimitUnavailable("there is no memory cgroup")
    try:
        group = MemoryGroup(Path(tempfile.mkdtemp(prefix=PREFIX, dir=place.directory)), *place[1:])
    except OSError as error:
        raise LimitUnavailable(f"no cgroup can be made: {error.strerror}") from error
    try:
        try:
            if place.version == 2:
                _delegate_memory(place.directory)
            group.set_limit(limit_bytes)
        except OSError as error:
            raise LimitUnavailable(f"no cgroup can be limited: {error.strerror}") from error
        yield group
    finally:
        group.remove()


def own_place() -> Place | None:
    """The memory group of this process; None if there is none to be seen."""
    return _read_place(Path("/"), "memory")


def own_groups(root: Path, controller: str) -> Iterator[Place]:
    """The group of this process that a controller goes by, and those above it, all that are seen.

    `root` is where /proc and /sys are looked for; the directories are below it.
    """
    place = _read_place(root, controller)
    if place is None:
        return
    directory = root / place.directory.relative_to("/")
    for above in (directory, *directory.parents):
        if above == root:
            return
        yield Place(above, place.version)


def find_place(groups: str, mounts: str, controller: str = "memory") -> Place | None:
    """The group that /proc/self/cgroup and mountinfo tell of.

    `4:memory:/a` with a cgroup mounted on /sys/fs/cgroup/memory gives /sys/fs/cgroup/memory/a, 1;
    `0::/a` with a cgroup2 mounted on /sys/fs/cgroup gives /sys/fs/cgroup/a, 2.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return _below_mount(mounts, path, controller)
    for line in groups.splitlines():
        if line.startswith("0::"):
            return _below_mount(mounts, line[3:], None)
    return None


def _read_place(root: Path, controller: str) -> Place | None:
    try:
        groups = (root / "proc/self/cgroup").read_text()
        mounts = (root / "proc/self/mountinfo").read_text()
    except OSError:
        return None
    return find_place(groups, mounts, controller)


def _below_mount(mounts: str, path: str, controller: str | None) -> Place | None:
    """Where a path of a hierarchy is mounted; a container may see a part of it only.

    The hierarchy is that of a controller, or without one the only one of version 2.
    """
    kind = "cgroup" if controller else "cgroup2"
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        root, mount = left.split()[3:5]
        found, _, options = right.split(" ", 2)  # the middle one, a source, may be empty
        is_its = controller is None or controller in options.split(",")
        if found == kind and is_its and Path(path).is_relative_to(root):
            return Place(Path(mount) / Path(path).relative_to(root), 1 if controller else 2)
    return None


def _delegate_memory(directory: Path) -> None:
    """Let groups below this one have limits; the kernel refuses where processes are in it."""
    control = directory / "cgroup.subtree_control"
    if "memory" not in control.read_text().split():
        control.write_text("+memory")
