"""Experts of a released checkpoint, written once in the form in which single ones can be read.

Files of others have an expert in several places, quantised in their own way, or among its like. The
first load that is to offload experts writes a native directory beside other caches, all or nothing,
and goes on where it was cut off; later ones use it for as long as the checkpoint stays as it is.
"""

import fcntl
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from engine.checkpoint_any import open_foreign
from engine.checkpoint_tensors import translated
from engine.checkpoint_writer import open_writer, partial_path, remove_model
from engine.convert import Progress, Source, identify, transfer
from engine.errors import CheckpointError
from engine.machine import cache_folder
from engine.model_paths import model_title

logger = logging.getLogger(__name__)

FOLDER = "experts"
LOCK = ".lock"


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
    directory = _place(path, open_foreign(path), dtype).directory
    return directory if directory.exists() else None


def prepare_experts(
    path: Path, dtype: torch.dtype, on_progress: Callable[[Progress], None]
) -> Path:
    """The native directory of a checkpoint of another kind, written if it is not there yet.

    One process at a time writes; others wait for it. What was made of an older state of the same
    files is deleted. Memory is needed for one tensor, or one expert.
    Raises CheckpointError if the checkpoint is damaged, or there is no place to write it to.
    """
    source = open_foreign(path)
    place = _place(path, source, dtype)
    try:
        with _alone(place):
            _remove_older(place)
            if not place.directory.exists():
                logger.info("%s: experts are written once, to %s", path, place.directory)
                _write(path, source, dtype, place.directory, on_progress)
    except CheckpointError as error:
        raise CheckpointError(
            f"{path}: experts are written once to be offloaded, in the folder that XDG_CACHE_HOME "
            f"names: {error}"
        ) from error
    return place.directory


def _write(
    path: Path,
    source: Source,
    dtype: torch.dtype,
    directory: Path,
    on_progress: Callable[[Progress], None],
) -> None:
    facts = identify(path, source)
    with open_writer(directory, source.config, dtype, {}, source=facts) as writer:
        for item in transfer(source, str(path), writer):
            on_progress(item)
        writer.finish()


def _place(path: Path, source: Source, dtype: torch.dtype) -> _Place:
    short = str(dtype).removeprefix("torch.")
    whose = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    state = hashlib.sha256(identify(path, source).encode()).hexdigest()[:16]
    return _Place(cache_folder() / FOLDER, f"{model_title(path)}-{short}-{whose}", state)


def _remove_older(place: _Place) -> None:
    """Delete what was made, or half made, of files that have changed since."""
    kept = (place.directory, partial_path(place.directory))
    with translated(place.folder, "listed"):
        found = [entry for entry in place.folder.iterdir() if entry.is_dir()]
    for entry in found:
        if entry.name.startswith(f"{place.begin}-") and entry not in kept:
            with translated(entry, "deleted"):
                remove_model(entry)


@contextmanager
def _alone(place: _Place) -> Iterator[None]:
    """Hold a lock, as long as another process that writes the same model makes it last."""
    path = place.folder / (place.begin + LOCK)
    with translated(path, "written"):
        place.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
