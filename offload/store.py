"""The expert store of one MoE layer: a safetensors file of equal, aligned blobs, one per expert.

    u64 header size | JSON header, padded with spaces | blob 0 | blob 1 | ...
                                                      ^ at a multiple of 4096 bytes

Any safetensors tool opens the file and sees one U8 tensor per expert (`expert-000`, ...). The
metadata tells what lies where inside a blob, and a checksum per blob. Reading is positioned reads
of byte ranges.
"""

import contextlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

from offload.errors import ReadCancelled, StoreError
from offload.layout import PAGE_BYTES, BlobLayout, layout_from_json, round_up

try:
    from isal.isal_zlib import crc32  # 17 GB/s on one core
except ImportError:  # the same sums, at 2 GB/s: slower than many disks
    from zlib import crc32

Bytes = NDArray[np.uint8]

FORMAT = "infmoe-experts"
VERSION = "1"
CHUNK_BYTES = 8 << 20  # read at once; whole pages, so that direct reads stay aligned
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format


class StoreWriter:
    """Writes a store expert by expert under a temporary name; `finish` makes it appear.

    Use as a context manager: leaving it without `finish` deletes what was written.
    """

    def __init__(self, file: int, path: Path, layer: str, layout: BlobLayout, num_experts: int):
        self._file = file
        self._path = path
        self._is_in_place = False
        self._layer = layer
        self.layout = layout
        self._checksums: list[int | None] = [None] * num_experts
        self._data_start = len(_header(layer, layout, [0] * num_experts))

    def write(self, expert: int, tensors: Mapping[str, Bytes]) -> None:
        """Write the tensors of one expert, each as its raw bytes; the padding is zero.

        Raises ValueError if the tensors are not those of the layout, StoreError if they cannot be.
        """
        if not 0 <= expert < len(self._checksums):
            raise ValueError(f"expert {expert} not in 0..{len(self._checksums) - 1}")
        if tensors.keys() != {spec.name for spec in self.layout.tensors}:
            raise ValueError(f"expert {expert}: got {list(tensors)}, not the tensors of the layout")
        start = self._data_start + expert * self.layout.blob_bytes
        end, checksum = 0, 0
        for spec in self.layout.tensors:
            data = tensors[spec.name]
            if (
                data.dtype != np.uint8
                or data.shape != (spec.nbytes,)
                or not data.flags.c_contiguous
            ):
                raise ValueError(
                    f"expert {expert}: {spec.name} is not a row of {spec.nbytes} bytes"
                )
            checksum = crc32(bytes(spec.offset - end), checksum)
            checksum = crc32(data.data, checksum)
            self._write_at(data, start + spec.offset)
            end = spec.offset + spec.nbytes
        self._checksums[expert] = crc32(bytes(self.layout.blob_bytes - end), checksum)

    def finish(self) -> None:
        """Write the header, push everything to the disk, and give the file its name.

        Raises ValueError if an expert was not written.
        """
        checksums = [checksum for checksum in self._checksums if checksum is not None]
        if missing := len(self._checksums) - len(checksums):
            raise ValueError(f"{self._path}: {missing} experts were not written")
        header = _header(self._layer, self.layout, checksums)
        assert len(header) == self._data_start
        self._write_at(np.frombuffer(header, np.uint8), 0)
        try:
            os.ftruncate(self._file, self._data_start + len(checksums) * self.layout.blob_bytes)
            os.fsync(self._file)
            file, self._file = self._file, -1
            os.close(file)
            _temporary(self._path).replace(self._path)
            self._is_in_place = True
            _sync_directory(self._path.parent)
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be written: {error.strerror}") from error

    def _write_at(self, data: Bytes, offset: int) -> None:
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file, data[done:].data, offset + done)
        except OSError as error:
            raise StoreError(f"{self._path}: cannot be written: {error.strerror}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if not self._is_in_place:
            _temporary(self._path).unlink(missing_ok=True)


def create_store(path: Path, layer: str, layout: BlobLayout, num_experts: int) -> StoreWriter:
    """Start to write the store of a layer. Raises StoreError if the file cannot be created."""
    if num_experts < 1:
        raise ValueError(f"num_experts is {num_experts}; it must be at least 1")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        file = os.open(_temporary(path), flags, 0o666)
    except OSError as error:
        raise StoreError(f"{path}: cannot be created: {error.strerror}") from error
    return StoreWriter(file, path, layer, layout, num_experts)


def store_bytes(layer: str, layout: BlobLayout, num_experts: int) -> int:
    """Size of the file of a layer that is still to be written."""
    return len(_header(layer, layout, [0] * num_experts)) + num_experts * layout.blob_bytes


class ExpertStore:
    """An open store. Several threads may read at once; close it when no read is under way.

    With `bypass_cache` reads go past the page cache: directly into page-aligned buffers where the
    file system can do that (`is_direct`), else the pages are given back after each read.
    """

    def __init__(
        self,
        file: int,
        path: Path,
        layer: str,
        layout: BlobLayout,
        checksums: list[int],
        start: int,
    ):
        self._file = file
        self._direct = -1
        self._bypass_cache = False
        self._checksums = checksums
        self._data_start = start
        self._is_verified = bytearray(len(checksums))
        self._stamp: tuple[int, int] | None = None  # of the file, when something was read last
        self.path = path
        self.layer = layer
        self.layout = layout
        self.num_experts = len(checksums)

    def offset(self, expert: int) -> int:
        """Where the blob of an expert begins in the file, in bytes; a multiple of 4096."""
        if not 0 <= expert < self.num_experts:
            raise ValueError(f"expert {expert} not in 0..{self.num_experts - 1} of {self.path}")
        return self._data_start + expert * self.layout.blob_bytes

    def read_blob(
        self,
        expert: int,
        out: Bytes | None = None,
        is_cancelled: Callable[[], bool] | None = None,
    ) -> Bytes:
        """Read the blob of an expert, into `out` (blob_bytes,) if given. Returns the filled buffer.

        The checksum is verified the first time that an expert is read, and once more if the file
        has been written to since. `is_cancelled` is asked before each chunk of 8 MiB.
        Raises StoreError if the blob is damaged, or the file has shrunk or cannot be read,
        ReadCancelled if `is_cancelled` says so; then `out` holds nothing of use.
        """
        start = self.offset(expert)
        if out is None:
            out = np.empty(self.layout.blob_bytes, np.uint8)
        is_row = out.shape == (self.layout.blob_bytes,) and out.flags.c_contiguous
        if out.dtype != np.uint8 or not is_row:
            raise ValueError(f"out is no uint8 buffer of {self.layout.blob_bytes} contiguous bytes")
        is_verified = self._verified_so_far(expert)
        is_new, checksum = not is_verified[expert], 0
        for begin in range(0, len(out), CHUNK_BYTES):
            if is_cancelled is not None and is_cancelled():
                raise ReadCancelled(f"{self._at(expert)}: the read was cancelled")
            chunk = out[begin : begin + CHUNK_BYTES]
            self._read_chunk(expert, start + begin, chunk)
            if is_new:  # chunk by chunk, while it is in the processor's cache
                checksum = crc32(chunk.data, checksum)
        if is_new:
            self._compare(expert, checksum)
            is_verified[expert] = True
        return out

    def bypass_cache(self) -> None:
        """Read past the page cache from now on."""
        self._bypass_cache = True
        with contextlib.suppress(OSError):  # not every file system reads directly
            self._direct = os.open(self.path, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    @property
    def is_direct(self) -> bool:
        """Whether aligned reads go directly from the disk to the buffer."""
        return self._direct >= 0

    def _verified_so_far(self, expert: int) -> bytearray:
        """Which experts need no checksum; none at first, and after a change of the file."""
        try:
            found = os.fstat(self._file)
        except OSError as error:
            raise StoreError(f"{self._at(expert)}: cannot be read: {error.strerror}") from error
        stamp = found.st_mtime_ns, found.st_size
        if stamp != self._stamp:  # a new table: reads under way go on to note theirs in the old one
            self._is_verified = bytearray(self.num_experts)
            self._stamp = stamp  # last: who sees it must see the new table
        return self._is_verified

    def _read_chunk(self, expert: int, start: int, chunk: Bytes) -> None:
        """Fill `chunk` from byte `start` on. Raises StoreError if the file ends before."""
        direct = self.is_direct and chunk.ctypes.data % PAGE_BYTES == 0
        file = self._direct if direct else self._file
        done = 0
        try:
            while done < len(chunk) and (n := os.preadv(file, [chunk[done:].data], start + done)):
                done += n
                if direct and n % PAGE_BYTES:  # the end of the file; to read on would be refused
                    break
            if self._bypass_cache and not direct:
                os.posix_fadvise(self._file, start, done, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise StoreError(f"{self._at(expert)}: cannot be read: {error.strerror}") from error
        if done < len(chunk):
            raise StoreError(f"{self._at(expert)}: the file ends inside the blob; copy it again")

    def verify(self, expert: int, blob: Bytes) -> None:
        """Compare a blob with its checksum. Raises StoreError if they differ."""
        self._compare(expert, crc32(blob.data))

    def _compare(self, expert: int, found: int) -> None:
        if found != self._checksums[expert]:
            raise StoreError(
                f"{self._at(expert)}: damaged: checksum {found:08x} is not "
                f"{self._checksums[expert]:08x}; copy or convert the file again"
            )

    def _at(self, expert: int) -> str:
        return f"{self.path}: layer {self.layer}, expert {expert}"

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)
        if self.is_direct:
            os.close(self._direct)
        self._file = self._direct = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_store(path: Path) -> ExpertStore:
    """Open a store and check its header against the file.

    Raises StoreError, naming file and reason, if it is not a complete store of this version.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise StoreError(f"{path}: cannot be opened: {error.strerror}") from error
    try:
        return _read_header(file, path)
    except OSError as error:
        os.close(file)
        raise StoreError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        os.close(file)
        raise StoreError(f"{path}: not a complete expert store: {error}") from error


def _read_header(file: int, path: Path) -> ExpertStore:
    """Parse and check the header; open_store translates whatever this raises."""
    file_bytes = os.fstat(file).st_size
    prefix = os.pread(file, 8, 0)
    header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else file_bytes
    start = 8 + header_bytes
    if header_bytes > MAX_HEADER_BYTES or start > file_bytes:
        raise ValueError("no safetensors header, or the file is cut off inside it")
    entries = json.loads(os.pread(file, header_bytes, 8))
    metadata = entries.pop("__metadata__", {})
    if metadata.get("format") != FORMAT:
        raise ValueError(f"the metadata lacks format {FORMAT!r}")
    if metadata.get("version") != VERSION:
        raise ValueError(f"version {metadata.get('version')!r} is not {VERSION}; upgrade InfMoE")
    if metadata.get("checksum") != "crc32":
        raise ValueError(f"checksum {metadata.get('checksum')!r} is unknown; known: crc32")
    layout = layout_from_json(metadata["layout"])
    checksums = [int(text, 16) for text in metadata["checksums"].split()]
    if start % PAGE_BYTES:
        raise ValueError(f"data begins at byte {start}, not at a multiple of {PAGE_BYTES}")
    if not checksums or entries != _entries(layout, len(checksums)):
        raise ValueError(f"its tensors are not {len(checksums)} blobs of {layout.blob_bytes} bytes")
    expected = start + len(checksums) * layout.blob_bytes
    if file_bytes != expected:
        raise ValueError(f"the file has {file_bytes} bytes, its header tells of {expected}")
    return ExpertStore(file, path, str(metadata["layer"]), layout, checksums, start)


def _entries(layout: BlobLayout, num_experts: int) -> dict[str, dict[str, object]]:
    size = layout.blob_bytes
    return {
        f"expert-{i:03d}": {
            "dtype": "U8",
            "shape": [size],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(num_experts)
    }


def _header(layer: str, layout: BlobLayout, checksums: list[int]) -> bytes:
    """Length prefix and JSON, padded to whole pages. Its size does not depend on the checksums."""
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "layer": layer,
        "layout": layout.to_json(),
        "checksum": "crc32",
        "checksums": " ".join(f"{checksum:08x}" for checksum in checksums),
    }
    text = json.dumps({"__metadata__": metadata, **_entries(layout, len(checksums))}).encode()
    padded = text.ljust(round_up(8 + len(text), PAGE_BYTES) - 8)
    return struct.pack("<Q", len(padded)) + padded


def _temporary(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _sync_directory(directory: Path) -> None:
    """Make a rename in the directory survive a power cut."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
