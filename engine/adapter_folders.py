"""A directory of adapters on the disk: what is in it, which version is current.

DIR/NAME/VERSION/ holds a version, DIR/NAME/ itself may hold a plain folder of PEFT, the file
DIR/NAME/current may name the version that the name alone means. Nothing outside DIR is looked at.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from engine.adapters import NAME, PEFT_CONFIG, PICKLE, TENSORS
from engine.adapters_manifest import FILES, MANIFEST
from engine.errors import CheckpointError

POINTER = "current"
PLAIN = ""  # stands for the version of a plain folder, which is not known before it is read
MAX_POINTER_BYTES = 256
DIGITS = re.compile(r"(\d+)")

Signature = tuple[tuple[str, int, int, int], ...]  # name, bytes, time of change, inode, per file


def is_name(text: str) -> bool:
    """Whether a text may name an adapter, or a version of one."""
    return NAME.fullmatch(text) is not None


def is_version(text: str) -> bool:
    """Whether a folder of that name is a version: the pointer's name is taken."""
    return is_name(text) and text != POINTER


def list_names(root: Path) -> dict[str, int]:
    """Each name with the time of the last change in its folder. One scan, no folder is opened.

    Raises OSError if the directory cannot be read.
    """
    with os.scandir(root) as entries:
        return dict(_changes(root, entries))


def read_change(root: Path, name: str) -> int | None:
    """The time of the last change in the folder of a name; None if there is none.

    Raises OSError if that cannot be told.
    """
    if not is_name(name):
        return None
    path = root / name
    try:
        if not path.is_dir() or not is_inside(root, path):
            return None
        return path.stat().st_mtime_ns
    except FileNotFoundError:  # gone meanwhile
        return None


def _changes(root: Path, entries: Iterator[os.DirEntry[str]]) -> Iterator[tuple[str, int]]:
    for entry in entries:
        if is_name(entry.name):
            change = read_change(root, entry.name) if entry.is_symlink() else _own_change(entry)
            if change is not None:
                yield entry.name, change


def _own_change(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat().st_mtime_ns if entry.is_dir(follow_symlinks=False) else None
    except OSError:  # gone meanwhile
        return None


def list_versions(root: Path, name: str) -> dict[str, Path]:
    """The folders of a name by version, the one that it means by itself first.

    That is the version in the pointer, else the greatest, where numbers in names count as numbers:
    v10 is above v9. A plain folder is below all others. Raises OSError if it cannot be read.
    """
    path = root / name
    with os.scandir(path) as entries:
        names = {entry.name for entry in entries if entry.is_dir() and is_version(entry.name)}
    folders = {name: path / name for name in sorted(names, key=natural_order, reverse=True)}
    folders = {name: folder for name, folder in folders.items() if is_inside(root, folder)}
    if any((path / file).exists() for file in (PEFT_CONFIG, TENSORS, PICKLE, MANIFEST)):
        folders[PLAIN] = path
    pointer = read_pointer(path)
    if pointer is not None:
        first = pointer if pointer in folders else PLAIN  # the plain one may have that version
        if first in folders:
            folders = {first: folders[first], **folders}
    return folders


def read_pointer(path: Path) -> str | None:
    """The version in the pointer of a name; None if there is none, or nonsense."""
    try:
        with (path / POINTER).open("rb") as file:
            text = file.read(MAX_POINTER_BYTES).decode(errors="replace").strip()
    except OSError:
        return None
    return text if is_version(text) else None


def natural_order(text: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts numbers in texts by their value, and before letters: 1.9 < 1.10 < 1.x."""
    parts = DIGITS.split(text)
    return tuple((0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p)


def sign(path: Path) -> Signature:
    """What changes when a file of an adapter does. Raises CheckpointError if it is not there."""
    found = []
    for name in (*FILES, MANIFEST):
        try:
            facts = (path / name).stat()
        except FileNotFoundError:
            continue
        except OSError as error:
            raise CheckpointError(f"{path / name}: cannot be read: {error.strerror}") from error
        found.append((name, facts.st_size, facts.st_mtime_ns, facts.st_ino))
    return tuple(found)


def has_manifest(signature: Signature) -> bool:
    """Whether the files are listed, so that it can be told that they are whole."""
    return any(name == MANIFEST for name, *_ in signature)


def check_inside(root: Path, path: Path) -> None:
    """Raise CheckpointError if a file of an adapter is a link out of the directory."""
    for name in (*FILES, MANIFEST):
        if (path / name).exists() and not is_inside(root, path / name):
            raise CheckpointError(
                f"{path / name}: is a link out of the directory of adapters, which is not followed"
            )


def is_inside(root: Path, path: Path) -> bool:
    """Whether a path, all links followed, is below the directory."""
    return path.resolve().is_relative_to(root.resolve())
