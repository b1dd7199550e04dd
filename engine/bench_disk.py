"""The disk under `infmoe bench-offload`: its speed, and files dropped from the page cache."""

import mmap
import os
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from time import perf_counter

BLOCK_BYTES = 8 * 2**20


class DiskProbe:
    """Reads files round and round, past the page cache where that works: what the disk gives now.

    One reader with large blocks is enough: the kernel cuts each block into many requests at once.
    """

    def __init__(self, files: list[Path], seconds: float) -> None:
        self._seconds = seconds
        self._reads = read_round(files)

    def measure(self) -> float:
        """Bytes per second, going on where the last measurement ended."""
        began, done = perf_counter(), 0
        while perf_counter() - began < self._seconds:
            done += next(self._reads)
        return done / (perf_counter() - began)


def read_round(files: list[Path]) -> Iterator[int]:
    """Read blocks of files, again and again, and yield their sizes."""
    with mmap.mmap(-1, BLOCK_BYTES) as block:  # page-aligned, as direct reads ask for
        for path in cycle(files):
            file, offset = open_direct(path), 0
            try:
                while read := os.preadv(file, [block], offset):
                    yield read
                    offset += read
            finally:
                os.close(file)


def open_direct(path: Path) -> int:
    """Open a file for reads past the page cache, or plainly where those are not to be had."""
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        drop_cache(path)
        return os.open(path, os.O_RDONLY)


def drop_cache(path: Path) -> None:
    """Drop a file, or the files of a directory, from the page cache."""
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def read_ahead_kb(path: Path) -> int | None:
    """How far the kernel reads ahead of a page fault: what mapped files live by."""
    number = path.stat().st_dev
    file = Path(f"/sys/class/bdi/{os.major(number)}:{os.minor(number)}/read_ahead_kb")
    return int(file.read_text()) if file.exists() else None
