"""One writer of a directory at a time: a lock on a file in it, gone when its owner dies."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from engine.errors import CheckpointError

LOCK = "conversion.lock"


def lock_directory(directory: Path) -> int:
    """Lock a directory, which is created if need be. Returns a file handle; closing it unlocks.

    Raises CheckpointError if somebody else holds the lock.
    """
    while True:
        directory.mkdir(parents=True, exist_ok=True)
        try:
            handle = lock_file(directory / LOCK)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{directory}: is being written by another conversion; wait for its end, or choose "
                "another directory"
            ) from error
        if handle is not None:
            return handle


def lock_file(path: Path) -> int | None:
    """Lock a file, which is made; None if its owner took it away meanwhile: try again.

    Returns a file handle; closing it unlocks. Raises BlockingIOError if somebody else holds it.
    """
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    with suppress(FileNotFoundError):
        if path.stat().st_ino == os.fstat(handle).st_ino:
            return handle
    os.close(handle)
    return None
