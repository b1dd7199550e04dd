"""The head of a GGUF file: its metadata, and where its tensors lie.

Read here and not by the `gguf` package, whose reader trusts every count, takes a truncated file for
one with fewer numbers, and needs 6 s for SmolLM2's head where 0.5 s do; the package tells the sizes
of formats, and dequantises.

Source: the format's description, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from engine.checkpoint_tensors import Shape, translated
from engine.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
STRING, ARRAY = 8, 9
# kinds of values by their number, in struct's letters; 7 is a truth value
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
LEAST_STRING_BYTES = 8  # its length
MAX_DIMENSIONS = 4
# Metadata and names of tensors: 10 MB of a vocabulary of 256k. As lists they take several times as
# much, and a damaged count must not fill the memory with the tensors behind them.
MAX_HEAD_BYTES = 256 << 20
ALIGNMENT = 32
Value = str | int | float | list[str] | list[int] | list[float]


class Place(NamedTuple):
    """A tensor in a file: format, shape in PyTorch's order, first byte and number of bytes."""

    path: Path
    kind: int
    shape: Shape
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """What a GGUF file tells before its tensors; of a split one, the first part and all tensors."""

    path: Path
    metadata: Mapping[str, Value]
    places: Mapping[str, Place]
    files: tuple[Path, ...] = ()

    def text(self, key: str, default: str | None = None) -> str:
        """A text of the metadata. Raises CheckpointError if it is missing or none."""
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise CheckpointError(f"{self.path}: {key} is {_shown(value)}; expected a text")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of the metadata. Raises CheckpointError if it is missing or none."""
        value = self.metadata.get(key, default)
        if type(value) is not int:
            raise CheckpointError(f"{self.path}: {key} is {_shown(value)}; expected a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number of the metadata. Raises CheckpointError if it is missing or none."""
        value = self.metadata.get(key, default)
        if type(value) not in (int, float):
            raise CheckpointError(f"{self.path}: {key} is {_shown(value)}; expected a number")
        return value  # type: ignore[return-value]  # checked above

    def texts(self, key: str) -> list[str]:
        """A list of texts of the metadata. Raises CheckpointError if it is missing or none."""
        value = self.metadata.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{self.path}: {key} is {_shown(value)}; expected texts")
        return value  # type: ignore[return-value]  # checked above


def load_gguf_package() -> ModuleType:
    """The `gguf` package. Raises CheckpointError, with what installs it, if it is missing."""
    try:
        import gguf
    except ImportError as error:
        raise CheckpointError(
            "GGUF files need the package gguf; pip install 'infmoe[gguf]' has it"
        ) from error
    return gguf  # type: ignore[no-any-return, unused-ignore]  # typed or not, as it is installed


def read_header(path: Path) -> GgufHeader:
    """Read the metadata of a GGUF file, and where its tensors lie; no tensor is read.

    Of one part of a split file, as if there were no others.

    Raises CheckpointError if it is no GGUF file, damaged, truncated, or in formats not known.
    """
    with translated(path, "read"), path.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise CheckpointError(f"{path}: is no GGUF file: it does not begin with {MAGIC!r}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()


class _Reader:
    """Reads a file from its start, and never beyond its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path = path
        self._data = data
        self._at = len(MAGIC)
        self._end = min(len(data), MAX_HEAD_BYTES)

    def header(self) -> GgufHeader:
        version = self._scalar("I")
        if version not in VERSIONS:
            known = " and ".join(map(str, VERSIONS))
            hint = "; it is for big-endian machines" if version & 0xFFFF == 0 else ""
            raise CheckpointError(
                f"{self._path}: GGUF version {version} is not supported{hint}; supported: {known}"
            )
        num_tensors, num_values = self._scalar("Q"), self._scalar("Q")
        metadata: dict[str, Value] = {}
        for _ in range(num_values):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"{key} is there twice")
            metadata[key] = self._value(self._scalar("I"))
        infos = [self._info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise self._damaged(f"general.alignment is {alignment!r}")
        start = -(-self._at // alignment) * alignment
        places: dict[str, Place] = {}
        for name, place in infos:
            if name in places:
                raise self._damaged(f"{name} is there twice")
            if start + place.offset + place.num_bytes > len(self._data):
                raise self._damaged(f"{name} lies beyond its end")
            places[name] = place._replace(offset=start + place.offset)
        return GgufHeader(self._path, metadata, places, (self._path,))

    def _info(self) -> tuple[str, Place]:
        name = self._string()
        num_dimensions = self._scalar("I")
        if num_dimensions > MAX_DIMENSIONS:
            raise self._damaged(f"{name} has {num_dimensions} dimensions")
        shape = tuple(self._scalar("Q") for _ in range(num_dimensions))[::-1]
        kind, offset = self._scalar("I"), self._scalar("Q")
        sizes = load_gguf_package().GGML_QUANT_SIZES
        if kind not in sizes:
            raise CheckpointError(
                f"{self._path}: {name} is of a format, {kind}, that the installed gguf does not "
                "know; a newer one may"
            )
        block, block_bytes = sizes[kind]
        if not shape or not all(shape) or shape[-1] % block:
            raise self._damaged(f"{name} has shape {list(shape)}, in blocks of {block}")
        num_bytes = math.prod(shape) // block * block_bytes
        return name, Place(self._path, kind, shape, offset, num_bytes)

    def _value(self, kind: int) -> Value:
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            return self._scalar(self._letter(kind))
        item_kind, count = self._scalar("I"), self._scalar("Q")
        if item_kind == STRING:
            if count * LEAST_STRING_BYTES > self._end - self._at:
                raise self._damaged("a list goes on beyond its head")
            return [self._string() for _ in range(count)]
        items = np.dtype(f"<{self._letter(item_kind)}")
        listed: list[int] = np.frombuffer(self._take(count * items.itemsize), items).tolist()
        return listed

    def _letter(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self._damaged(f"a value is of kind {kind}")
        return SCALARS[kind]

    def _scalar(self, letter: str) -> int:
        size = struct.calcsize(f"<{letter}")
        value: int = struct.unpack(f"<{letter}", self._take(size))[0]
        return value

    def _string(self) -> str:
        content = self._take(self._scalar("Q"))
        try:
            return content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged(f"{content[:40]!r} is not UTF-8") from error

    def _take(self, num_bytes: int) -> bytes:
        if num_bytes > self._end - self._at:
            if self._end == len(self._data):
                raise self._damaged("it ends inside its head")
            raise self._damaged(f"its head goes on beyond {MAX_HEAD_BYTES >> 20} MiB")
        self._at += num_bytes
        return self._data[self._at - num_bytes : self._at]

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self._path}: truncated or damaged ({what}); copy or download it again"
        )


def _shown(value: object) -> str:
    return "missing" if value is None else repr(value)[:60]
