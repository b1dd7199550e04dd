"""Putting versions into a directory of adapters, and taking them out: wholly, or not at all.

What is being written lies in DIR/.upload-*, in the same file system, until it is complete and on
the disk; then one rename makes it a version. A lock tells what a crash left from others' work.
"""

import fcntl
import os
import shutil
import uuid
from pathlib import Path
from typing import Literal

from engine.adapter_folders import POINTER, is_name, is_version, read_pointer
from engine.adapter_store import AdapterStore
from engine.adapters_manifest import (
    FILES,
    MANIFEST,
    NEEDED,
    check_manifest,
    content_sha256,
    measure_files,
    sync_directory,
    write_manifest,
)
from engine.errors import RequestError

PREFIX = ".upload-"
LOCK = ".upload.lock"
KEPT = (*FILES, MANIFEST)  # what an upload may bring


Outcome = Literal["new", "known", "taken"]  # known: is there, the same; taken: is there, another


class Upload:
    """A version on its way into the directory: `open`, then files, `install`; at last `close`."""

    def __init__(self, root: Path, name: str, version: str) -> None:
        check_names(name, version)
        self.path = root / f"{PREFIX}{uuid.uuid4().hex}"
        self._root = root
        self._name = name
        self._version = version
        self._lock: int | None = None
        self._file: int | None = None

    def open(self) -> None:
        """Make room for the files. Raises OSError if that cannot be done."""
        self._lock = _lock(self._root, fcntl.LOCK_SH)
        self.path.mkdir()

    def close(self) -> None:
        """Remove what was not installed."""
        for handle in (self._file, self._lock):
            if handle is not None:
                os.close(handle)
        self._file = self._lock = None
        shutil.rmtree(self.path, ignore_errors=True)

    def begin(self, file_name: str) -> None:
        """Begin the next file. Raises RequestError if it is none of an adapter, or came before."""
        self._end_file()
        if file_name not in KEPT:
            raise RequestError(f"{file_name[:64]!r} is no file of an adapter: {', '.join(KEPT)}")
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._file = os.open(self.path / file_name, flags, 0o644)
        except FileExistsError as error:
            raise RequestError(f"{file_name} comes twice") from error

    def write(self, data: bytes) -> None:
        """Add to the file that was begun last. Raises OSError if the disk is full."""
        assert self._file is not None
        while data:
            data = data[os.write(self._file, data) :]

    def install(self, store: AdapterStore) -> Outcome:
        """Check what came by reading it, and make it a version unless there is one.

        Raises RequestError if a file is missing, CheckpointError if it cannot be served, OSError if
        the disk is full, EngineStopped without a model to check it with.
        """
        self._end_file()
        for name in NEEDED:
            if not (self.path / name).exists():
                raise RequestError(f"{name} is missing")
        facts = measure_files(self.path)
        if (self.path / MANIFEST).exists():  # of the sender: tells that nothing was lost
            check_manifest(self.path, facts)
        store.reader.read(self.path, self._name, self._version)
        write_manifest(self.path)
        target = self._root / self._name / self._version
        target.parent.mkdir(exist_ok=True)
        try:
            self.path.rename(target)
        except OSError:  # a folder that is not empty is not replaced
            if not target.exists():
                raise
            is_same = content_sha256(measure_files(target)) == content_sha256(facts)
            return "known" if is_same else "taken"
        sync_directory(target.parent)
        sync_directory(self._root)
        return "new"

    def _end_file(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
            os.close(self._file)
            self._file = None


def check_names(name: str, version: str) -> None:
    """Raise RequestError unless both may be names of folders."""
    rule = "up to 64 letters, digits and . _ -, the first a letter or digit"
    if not is_name(name):
        raise RequestError(f"the name is none; allowed: {rule}", "name")
    if not is_version(version):
        raise RequestError(f"the version is none; allowed: {rule}; not {POINTER!r}", "version")


def remove_version(store: AdapterStore, name: str, version: str | None) -> None:
    """Take a version out of the directory, or for None all of a name; in flight stays in flight.

    If it was current, the name means the greatest of the others. Raises RequestError if it is not
    there, OSError if it cannot be removed.
    """
    told = store.tell(name)  # raises RequestError
    folder = store.root / name
    if version is None:
        _throw_away(store.root, folder)
    elif is_version(version) and (folder / version).is_dir():
        _forget_pointer(folder, version)
        _throw_away(store.root, folder / version)
    elif any(info.version == version for info in told):  # the plain one
        _forget_pointer(folder, version)
        _remove_plain(store.root, folder)
    else:
        text = f"adapter {name!r} has no version {version[:64]!r}; a plain folder is loaded first"
        raise RequestError(text, "version")
    sync_directory(store.root)
    store.look()


def remove_leftovers(root: Path) -> int:
    """Remove what uploads left that a crash cut short; returns how many. Not while one goes on."""
    left = [path for path in root.iterdir() if path.name.startswith(PREFIX)]
    if not left:
        return 0
    try:
        handle = _lock(root, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # an upload goes on, or the directory is read-only
        return 0
    try:
        for path in left:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(handle)
    return len(left)


def _forget_pointer(folder: Path, version: str) -> None:
    if read_pointer(folder) == version:
        (folder / POINTER).unlink(missing_ok=True)


def _remove_plain(root: Path, folder: Path) -> None:
    if not any(path.is_dir() and is_version(path.name) for path in folder.iterdir()):
        _throw_away(root, folder)
        return
    for name in KEPT:  # the config first: without it the rest is nothing
        (folder / name).unlink(missing_ok=True)


def _throw_away(root: Path, path: Path) -> None:
    """Remove a folder at one stroke, and what was in it at leisure."""
    if path.is_symlink():
        path.unlink()
        return
    handle = _lock(root, fcntl.LOCK_SH)
    try:
        trash = root / f"{PREFIX}{uuid.uuid4().hex}"
        path.rename(trash)
        shutil.rmtree(trash, ignore_errors=True)
    finally:
        os.close(handle)


def _lock(root: Path, how: int) -> int:
    handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(handle, how)
    except OSError:
        os.close(handle)
        raise
    return handle
