"""GGUF files that were split into parts, read as the one file that they were.

Source: llama.cpp's gguf-split, which also names them: NAME-00001-of-00003.gguf.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from engine.checkpoint_gguf_header import GgufHeader, Place, read_header
from engine.checkpoint_tensors import translated
from engine.errors import CheckpointError
from engine.model_paths import gguf_parts

NUMBER, COUNT, NUM_TENSORS = "split.no", "split.count", "split.tensors.count"


def open_header(path: Path) -> GgufHeader:
    """The header of a GGUF file, with the tensors of all its parts, read once while they stay so.

    Plan, load, tokenizer and template all want it.
    Raises CheckpointError if one is missing or damaged, or they do not belong together.
    """
    paths = gguf_parts(path)
    if missing := [part for part in paths if len(paths) > 1 and not part.exists()]:
        raise CheckpointError(
            f"{missing[0]}: is missing; the model is split into {len(paths)} files, and all "
            "of them must be there"
        )
    facts = []
    for part in paths:
        with translated(part, "read"):
            stat = part.stat()
        facts.append((part, stat.st_size, stat.st_mtime_ns))
    return _read(tuple(facts))


@lru_cache(maxsize=1)
def _read(facts: tuple[tuple[Path, int, int], ...]) -> GgufHeader:
    return _join([read_header(path) for path, _, _ in facts])


def _join(headers: Sequence[GgufHeader]) -> GgufHeader:
    """One header of those of the parts; the first part has the metadata."""
    first, places = headers[0], dict[str, Place]()
    for number, header in enumerate(headers):
        found = (header.integer(NUMBER, 0), header.integer(COUNT, 1))
        if found != (number, len(headers)):
            told = f"part {found[0] + 1} of {found[1]}"
            raise CheckpointError(
                f"{header.path}: says that it is {told}, its name {number + 1} of {len(headers)}; "
                "parts are called NAME-00001-of-00003.gguf and so on"
            )
        if twice := sorted(places.keys() & header.places.keys()):
            raise CheckpointError(f"{header.path}: has {twice[0]}, as has a part before it")
        places |= header.places
    total = first.integer(NUM_TENSORS, len(places))
    if total != len(places):
        raise CheckpointError(
            f"{first.path}: {total} tensors are told of, and {len(places)} are there; copy or "
            "download all parts again"
        )
    return replace(first, places=places, files=tuple(header.path for header in headers))
