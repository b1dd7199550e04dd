"""Which adapters are to stay in memory, in a file beside them: a restart pins them again."""

import errno
import fcntl
import json
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.adapter_folders import is_name, is_version
from engine.adapters_manifest import write_file

logger = logging.getLogger(__name__)

PINS = ".pins.json"  # no adapter is called so
LOCK = ".pins.lock"
FORMAT = 1
MAX_BYTES = 2**20
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


class AdapterPins:
    """The `name@version` that are pinned. For any thread, and any process that has the directory.

    A process knows those that were in the file when it first looked, and its own; each change is
    made to what the file has then. A file that is none of ours is left alone until the next change.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._known: set[str] | None = None
        self._lock = threading.Lock()

    def wanted(self) -> list[str]:
        """All that this process is to keep, sorted."""
        with self._lock:
            return sorted(self._find_known())

    def has(self, reference: str) -> bool:
        """Whether that is one of them."""
        with self._lock:
            return reference in self._find_known()

    def add(self, reference: str) -> None:
        """Keep one, also after a restart. Raises OSError if the disk is full.

        In a directory that may not be written, until the process ends.
        """
        with self._lock:
            self._change(lambda pins: pins | {reference})
            self._find_known().add(reference)

    def discard(self, reference: str) -> None:
        """Keep one no longer. Raises OSError if the disk is full."""
        with self._lock:
            if reference in self._find_known() or reference in read_pins(self._root):
                self._change(lambda pins: pins - {reference})
                self._find_known().discard(reference)

    def _find_known(self) -> set[str]:
        if self._known is None:
            self._known = read_pins(self._root)
        return self._known

    def _change(self, change: Callable[[set[str]], set[str]]) -> None:
        try:
            with _locked(self._root):
                pins = sorted(change(read_pins(self._root)))
                text = json.dumps({"format": FORMAT, "pins": pins}, indent=2) + "\n"
                write_file(self._root / PINS, text.encode())
        except OSError as error:
            if error.errno not in READ_ONLY:
                raise
            logger.warning(
                "%s cannot be written: which adapters are pinned is forgotten at the end of this "
                "process (%s)",
                self._root / PINS,
                error.strerror,
            )


def read_pins(root: Path) -> set[str]:
    """What the file says is pinned; nothing without one. One that makes no sense is warned of."""
    path = root / PINS
    try:
        if not path.exists():
            return set()
        return _parse(path)
    except (OSError, ValueError, RecursionError) as error:
        text = "%s is no list of pinned adapters: it pins none, and the next pin replaces it (%s)"
        logger.warning(text, path, error)
        return set()


def _parse(path: Path) -> set[str]:
    """Raises ValueError or OSError if it is not what we write."""
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise ValueError(f"a file of at most {MAX_BYTES:,} bytes is expected")
    found = json.loads(path.read_bytes())
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'an object with "format": {FORMAT} is expected')
    pins = found.get("pins")
    if not isinstance(pins, list) or not all(map(_is_reference, pins)):
        raise ValueError('"pins" is to be a list of name@version')
    return set(pins)


def _is_reference(value: object) -> bool:
    if not isinstance(value, str):
        return False
    name, mark, version = value.partition("@")
    return bool(mark) and is_name(name) and is_version(version)


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
