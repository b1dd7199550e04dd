"""The list of an adapter's files with sizes and checksums, written last: whole, or not there."""

import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

from engine.adapters import OURS, PEFT_CONFIG, TENSORS
from engine.checkpoint_tensors import read_json, translated
from engine.errors import CheckpointError

MANIFEST = "manifest.json"
FILES = (PEFT_CONFIG, TENSORS, OURS)  # all that is read of an adapter
NEEDED = (PEFT_CONFIG, TENSORS)
MAX_JSON_BYTES = 2**20
CHUNK_BYTES = 2**20


class FileFacts(NamedTuple):
    """Size and SHA-256 of a file."""

    bytes: int
    sha256: str


def measure_files(path: Path) -> dict[str, FileFacts]:
    """Size and checksum of each file of an adapter that is there.

    Raises CheckpointError if one cannot be read, or is too large to be what its name says.
    """
    facts = {}
    for name in FILES:
        file = path / name
        if file.exists():
            _check_size(file)
            facts[name] = _measure(file)
    return facts


def content_sha256(facts: dict[str, FileFacts]) -> str:
    """One checksum for all files together."""
    lines = (f"{name} {fact.bytes} {fact.sha256}\n" for name, fact in sorted(facts.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_manifest(path: Path) -> None:
    """List the files that are there; call it when they are complete. Atomic, and on the disk."""
    files = {name: fact._asdict() for name, fact in measure_files(path).items()}
    text = json.dumps({"format": 1, "files": files}, indent=2) + "\n"
    write_file(path / MANIFEST, text.encode())


def check_manifest(path: Path, facts: dict[str, FileFacts]) -> None:
    """Raise CheckpointError unless the manifest lists just the files that were measured."""
    _check_size(path / MANIFEST)
    listed = read_json(path / MANIFEST).get("files")
    if not isinstance(listed, dict):
        raise CheckpointError(f"{path / MANIFEST}: has no files; expected name: bytes, sha256")
    for name in sorted(listed.keys() | facts.keys()):
        fact = facts.get(name)
        if fact is None or listed.get(name) != fact._asdict():
            raise CheckpointError(
                f"{path / name}: is not what {MANIFEST} lists; it is half written or was changed: "
                "copy the whole folder again"
            )


def write_file(path: Path, data: bytes) -> None:
    """Write a small file so that it is there as a whole or not at all, also after a crash."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Bring the names in a directory to the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _check_size(path: Path) -> None:
    """The JSON files are read as a whole, so they had better be small."""
    with translated(path, "read"):
        num_bytes = path.stat().st_size
    if path.suffix == ".json" and num_bytes > MAX_JSON_BYTES:
        raise CheckpointError(
            f"{path}: has {num_bytes:,} bytes; a file of settings has {MAX_JSON_BYTES:,} at most"
        )


def _measure(path: Path) -> FileFacts:
    digest, num_bytes = hashlib.sha256(), 0
    with translated(path, "read"), path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileFacts(num_bytes, digest.hexdigest())
