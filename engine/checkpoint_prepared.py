"""Experts of a released checkpoint, written once in the form in which single ones can be read.

Files of others have an expert in several places, quantised in their own way, or among its like. The
first load that is to offload experts writes a native directory beside other caches, all or nothing,
and goes on where it was cut off; later ones use it for as long as the checkpoint stays as it is.
"""

import fcntl
import hashlib
import json
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint import open_expert_stores, open_native
from engine.checkpoint_any import open_foreign
from engine.checkpoint_tensors import translated
from engine.checkpoint_writer import open_writer, partial_path, remove_model
from engine.config import FORMAT_VERSION
from engine.convert import Progress, Source, check_unchanged, identify, transfer
from engine.errors import CheckpointError
from engine.machine import cache_folder
from engine.model_paths import model_title
from engine.units import format_bytes

logger = logging.getLogger(__name__)

# One more whenever the same files are read as other numbers, or written in another way.
VERSION = 1
FOLDER = "experts"
LOCK = ".lock"
REMOVED = ".removed"  # what is being deleted: never taken for a model again
MAX_TITLE_BYTES = 100  # names of files have 255 at most
POLL_S = 0.2


class _Place(NamedTuple):
    """Where a model is written: `begin` is of its path and dtype, `end` of what lies there now."""

    folder: Path
    begin: str
    end: str

    @property
    def directory(self) -> Path:
        return self.folder / f"{self.begin}-{self.end}"


def find_prepared(path: Path, dtype: torch.dtype) -> Path | None:
    """The native directory that was made of a checkpoint as it is now, if there is one."""
    place = _place(path, _state(path, open_foreign(path)), dtype)
    return place.directory if _distrust(place.folder) is None and _is_whole(place) else None


def prepare_experts(
    path: Path,
    dtype: torch.dtype,
    on_progress: Callable[[Progress], None],
    on_wait: Callable[[], None] = lambda: None,
) -> Path:
    """The native directory of a checkpoint of another kind, written if it is not there yet.

    One process at a time writes; others wait for it, and `on_wait` is called some times a second.
    What was made of an older state of the same files is deleted. Memory is needed for one tensor,
    or one expert.
    Raises CheckpointError if the checkpoint is damaged or changes meanwhile, there is no place to
    write it to, or others could have written there.
    """
    state = _state(path, open_foreign(path))
    place = _place(path, state, dtype)
    try:
        _check_folder(place.folder)
        if not _is_whole(place):  # where it is, nothing needs to be written, not even a lock
            with _alone(place, on_wait):
                _remove_older(place)
                if not _is_whole(place):
                    _write(path, state, dtype, place, on_progress)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: experts are written once to be offloaded, in the folder that XDG_CACHE_HOME "
            f"names ('infmoe convert' writes them where you like): {error}"
        ) from error
    return place.directory


def _write(
    path: Path,
    state: str,
    dtype: torch.dtype,
    place: _Place,
    on_progress: Callable[[Progress], None],
) -> None:
    """Write the model. Raises CheckpointError if it is not to the end what `state` tells."""
    source = open_foreign(path)
    check_unchanged(path, state, _state(path, source))  # it may have waited for long
    logger.warning(  # it takes minutes, and as much of the disk as the whole model
        "%s: experts are written once, to %s; other models there take %s",
        path,
        place.directory,
        format_bytes(_size(place.folder)),
    )
    if place.directory.exists():
        logger.warning("%s: is damaged, and is written again", place.directory)
        _remove(place.directory)
    with open_writer(place.directory, source.config, dtype, {}, source=state) as writer:
        for item in transfer(source, str(path), writer):
            on_progress(item)
        check_unchanged(path, state, _state(path, source))
        writer.finish()


def _state(path: Path, source: Source) -> str:
    return json.dumps([VERSION, FORMAT_VERSION, identify(path, source)])


def _place(path: Path, state: str, dtype: torch.dtype) -> _Place:
    short = str(dtype).removeprefix("torch.")
    title = model_title(path).encode()[:MAX_TITLE_BYTES].decode(errors="ignore")
    whose = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    end = hashlib.sha256(state.encode()).hexdigest()[:16]
    folder = (cache_folder() / FOLDER).resolve()
    return _Place(folder, f"{title}-{short}-{whose}", end)


def _is_whole(place: _Place) -> bool:
    """Whether there is a model whose files have all their bytes; experts have sums for the rest."""
    try:
        config = open_native(place.directory).config
        for store in open_expert_stores(place.directory, config).values():
            store.close()
    except CheckpointError:
        return False
    return True


def _check_folder(folder: Path) -> None:
    """Create the folder if need be. Raises CheckpointError if others could have written there."""
    with translated(folder, "written"):
        folder.parent.mkdir(mode=0o755, parents=True, exist_ok=True)  # whatever the umask is
        folder.mkdir(mode=0o700, exist_ok=True)
        reason = _distrust(folder)
    if reason is not None:
        raise CheckpointError(
            f"{reason}, so what is in {folder} is not trusted; delete it, make it yours alone "
            "(chmod o-w), or name another folder"
        )


def _distrust(folder: Path) -> str | None:
    """Why a folder may hold what others made; None if it may not, or is not there.

    Its group is trusted, since nobody but the owner lets it in: Kubernetes does with `fsGroup`.
    """
    owners = (os.geteuid(), 0)
    for path in (folder, folder.parent):  # who can write in the latter can exchange the former
        try:
            found = path.stat()
        except OSError:
            return None
        if found.st_uid not in owners:
            return f"{path} belongs to user {found.st_uid}, and this is {owners[0]}"
        if found.st_mode & stat.S_IWOTH and (path == folder or not found.st_mode & stat.S_ISVTX):
            return f"{path} can be written by everybody"
    return None


def _remove_older(place: _Place) -> None:
    """Delete what was made, or half made, of files that have changed since."""
    kept = (place.directory, partial_path(place.directory))
    for entry in _directories(place.folder):
        if entry.name.startswith(f"{place.begin}-") and entry not in kept:
            _remove(entry)


def _remove(directory: Path) -> None:
    """Delete a model; who is killed meanwhile leaves nothing that could be taken for one."""
    with translated(directory, "deleted"):
        if not directory.name.endswith(REMOVED):
            target = directory.with_name(directory.name + REMOVED)
            remove_model(target)
            directory = directory.rename(target)
        remove_model(directory)


def _directories(folder: Path) -> list[Path]:
    with translated(folder, "listed"):
        return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]


def _size(folder: Path) -> int:
    """Bytes of all models in the folder."""
    files = (file for entry in _directories(folder) for file in entry.iterdir())
    with translated(folder, "listed"):
        return sum(file.stat().st_size for file in files)


@contextmanager
def _alone(place: _Place, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold a lock, as long as another process that writes the same model makes it last."""
    path = place.folder / (place.begin + LOCK)
    with translated(path, "written"):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with translated(path, "locked"):
            while not _try_lock(handle):
                on_wait()
                time.sleep(POLL_S)
        yield
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
