"""One process at a time where two would write over each other; free again when its owner dies."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.checkpoint_lock import lock_file
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
        try:
            handle = lock_file(path)
        except BlockingIOError as error:
            raise CheckpointError(
                f"{what}: another process is at work there; wait for its end, or choose another "
                "folder"
            ) from error
        if handle is not None:
            return handle
