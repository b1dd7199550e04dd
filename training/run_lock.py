"""One process at a time where two would write over each other; free again when its owner dies."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.errors import CheckpointError

LOCK = "run.lock"  # in the folder of a run


@contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """Hold the lock of a file, which is made and goes again; its folder must be there.

    Raises CheckpointError if another process holds it; `what` is what that one writes.
    """
    handle = _open(path, what)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits makes a new one
        os.close(handle)


def _open(path: Path, what: str) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise CheckpointError(
                f"{what}: another process is at work there; wait for its end, or choose another "
                "folder"
            ) from error
        if path.exists() and path.stat().st_ino == os.fstat(handle).st_ino:
            return handle
        os.close(handle)  # the owner was about to end and took the file away: once more
