"""Named tensors in safetensors files: one `model.safetensors`, or shards that an index lists."""

import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.errors import CheckpointError
from offload.errors import StoreError
from offload.layout import BlobLayout

Shape = tuple[int, ...]

MAPPED_BYTES = 64 * 2**20  # of a file that stay mapped once they have been read, at most
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
STORED_DTYPES = {**DTYPES, "I8": torch.int8, "U8": torch.uint8}  # of experts, quantised ones too

FULL = "choice_bias"  # of routers: numbers whose small differences decide stay in fp32
Blob = NDArray[np.uint8] | Tensor  # (blob_bytes,), uint8; a tensor may be in a GPU's memory


@contextmanager
def translated(path: Path, what: str) -> Iterator[None]:
    """Turn the errors of the file system, of safetensors and of offload into CheckpointError.

    `what` completes "PATH: cannot be ...".
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be {what}: {reason}") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"{path}: truncated or no safetensors file ({error}); copy or download it again"
        ) from error
    except StoreError as error:
        raise CheckpointError(str(error)) from error


def check_tensor(where: str, key: str, tensor: Tensor, expected: Shape) -> None:
    """Raise CheckpointError, naming expected and found, unless floats of that shape."""
    if tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"{where}: {key} has shape {list(tensor.shape)}, expected {list(expected)} by config"
        )
    if tensor.dtype not in DTYPE_NAMES:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPE_NAMES)
        raise CheckpointError(f"{where}: {key} is {tensor.dtype}, expected one of {allowed}")


def convert_tensor(where: str, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A contiguous tensor of the dtype. Raises CheckpointError if finite values become infinite."""
    result = tensor.to(dtype).contiguous()
    narrows = torch.finfo(dtype).max < torch.finfo(tensor.dtype).max
    if narrows and not torch.equal(torch.isfinite(result), torch.isfinite(tensor)):
        raise CheckpointError(f"{where}: {key} has values too large for {dtype}; use bfloat16")
    return result


def stored_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a tensor of a model of that dtype."""
    return torch.promote_types(dtype, torch.float32) if name.endswith(FULL) else dtype


def raw_bytes(tensor: Tensor) -> NDArray[np.uint8]:
    """The bytes of a contiguous tensor, shared, not copied."""
    result: NDArray[np.uint8] = tensor.detach().cpu().flatten().view(torch.uint8).numpy()
    return result


def blob_tensors(blob: Blob, layout: BlobLayout) -> dict[str, Tensor]:
    """The stored tensors of an expert as views of its blob."""
    flat = torch.as_tensor(blob)
    typed: dict[torch.dtype, Tensor] = {}
    tensors = {}
    for name, place in _places(layout).items():
        if place.dtype not in typed:
            typed[place.dtype] = flat.view(place.dtype)
        base = typed[place.dtype]
        start = base.storage_offset() + place.start
        tensors[name] = base.as_strided(place.shape, place.stride, start)
    return tensors


class _Place(NamedTuple):
    """A tensor in a blob seen as a row of its dtype; `start` and `stride` in elements."""

    dtype: torch.dtype
    shape: Shape
    stride: Shape
    start: int


@lru_cache(maxsize=16)
def _places(layout: BlobLayout) -> dict[str, _Place]:
    """What `blob_tensors` needs of a layout: it is called for every expert of every token."""
    places = {}
    for spec in layout.tensors:
        dtype = STORED_DTYPES[spec.dtype]
        stride = torch.empty(spec.shape, device="meta").stride()
        places[spec.name] = _Place(dtype, spec.shape, stride, spec.offset // dtype.itemsize)
    return places


class _Slice(Protocol):
    """safetensors' view of a tensor that is not read."""

    def get_shape(self) -> list[int]: ...
    def get_dtype(self) -> str: ...
    def __getitem__(self, index: int) -> Tensor: ...


class _Handle(Protocol):
    """safetensors' open file, typed."""

    def keys(self) -> list[str]: ...
    def get_tensor(self, name: str) -> Tensor: ...
    def get_slice(self, name: str) -> _Slice: ...


class TensorFiles:
    """The tensors of a set of open safetensors files, read one at a time."""

    def __init__(self, paths: Mapping[str, Path], handles: Mapping[Path, _Handle]) -> None:
        self._paths = paths
        self._handles = dict(handles)
        self._touched: dict[Path, int] = {}  # bytes read through the present mapping

    @property
    def files(self) -> tuple[Path, ...]:
        """The files, in order of their names."""
        return tuple(sorted(self._handles))

    def names(self) -> list[str]:
        """The keys, sorted."""
        return sorted(self._paths)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._paths[name]

    def shape(self, name: str) -> Shape:
        """Shape of a tensor that is not read."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor that is not read. Raises CheckpointError if missing or no float."""
        if name not in self._paths:
            raise CheckpointError(f"{self.files[0]}: there is no tensor {name}")
        found = self._slice(name).get_dtype()
        if found not in DTYPES:
            raise CheckpointError(f"{self._paths[name]}: {name} is {found}, expected a float dtype")
        return DTYPES[found]

    def tensor(self, name: str) -> Tensor:
        """Read a tensor into memory of its own (safetensors hands out views of the mapped file)."""
        path = self._paths[name]
        with translated(path, "read"):
            tensor = self._handles[path].get_tensor(name).clone()
        self._touch(path, tensor)
        return tensor

    def row(self, name: str, index: int) -> Tensor:
        """Read one of a tensor's first dimension, and no more of it."""
        path = self._paths[name]
        with translated(path, "read"):
            tensor = self._slice(name)[index].clone()
        self._touch(path, tensor)
        return tensor

    def _touch(self, path: Path, tensor: Tensor) -> None:
        """Count what was read of a file, and map it anew now and then."""
        self._touched[path] = self._touched.get(path, 0) + tensor.nbytes
        if (
            self._touched[path] > MAPPED_BYTES
        ):  # pages that were read count as memory until unmapped
            self._handles[path] = _open(path)
            self._touched[path] = 0

    def _slice(self, name: str) -> _Slice:
        return self._handles[self._paths[name]].get_slice(name)


def open_tensor_files(directory: Path) -> TensorFiles:
    """Open the safetensors files of a directory; every key is looked up, no tensor is read.

    Raises CheckpointError if there are none, a shard is missing or damaged, or the index is wrong.
    """
    if (directory / INDEX).exists():
        weight_map = read_index(directory / INDEX)
        handles = {path: _open(path) for path in sorted(set(weight_map.values()))}
        for path, handle in handles.items():
            listed = {name for name, place in weight_map.items() if place == path}
            if wrong := sorted(listed ^ set(handle.keys())):
                raise CheckpointError(
                    f"{directory / INDEX}: disagrees with {path.name}: {wrong[0]}"
                )
        return TensorFiles(weight_map, handles)
    if not (directory / SINGLE).exists():
        raise CheckpointError(f"{directory}: has neither {SINGLE} nor {INDEX}")
    return open_tensor_file(directory / SINGLE)


def open_tensor_file(path: Path) -> TensorFiles:
    """Open one safetensors file. Raises CheckpointError if it is missing or damaged."""
    handle = _open(path)
    return TensorFiles(dict.fromkeys(handle.keys(), path), {path: handle})


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object. Raises CheckpointError if the file is missing or holds anything else."""
    with translated(path, "read"):
        text = path.read_bytes()
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return values


def read_index(path: Path) -> dict[str, Path]:
    """Read name -> shard; a shard anywhere but beside the index is refused."""
    with translated(path, "read"):
        text = path.read_bytes()
    try:
        weight_map = json.loads(text)["weight_map"]
        return {str(name): path.with_name(shard) for name, shard in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: no index of shards with a weight_map: {error}") from error


def _open(path: Path) -> _Handle:
    if not path.exists():
        raise CheckpointError(f"{path}: is missing; copy or download it again")
    with translated(path, "opened"):
        path.open("rb").close()  # safetensors calls every failure "no such file"
        handle: _Handle = safe_open(path, framework="pt")
    return handle


class TensorWriter:
    """Writes tensors of known names and shapes into safetensors files, in any order, one at a time.

    All sizes are known from the start, so the headers come first and no shard waits in memory.
    """

    def __init__(
        self, directory: Path, shapes: Mapping[str, Shape], dtype: torch.dtype, shard_bytes: int
    ) -> None:
        self._directory = directory
        self._shapes = shapes
        self._dtype = dtype
        self._places: dict[str, tuple[Path, int]] = {}
        self._written: set[str] = set()
        self._shards = _plan_shards(shapes, dtype, shard_bytes)

    @property
    def file_bytes(self) -> int:
        """What the files take on the disk, but for the index."""
        return sum(_header(names, self._shapes, self._dtype)[2] for names in self._shards)

    def create(self) -> None:
        """Create the files, with their headers and their final sizes."""
        count = len(self._shards)
        for number, names in enumerate(self._shards, 1):
            file_name = SINGLE if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
            path = self._directory / file_name
            header, offsets, file_bytes = _header(names, self._shapes, self._dtype)
            with translated(path, "written"), path.open("wb") as file:
                file.write(header)
                file.truncate(file_bytes)
            self._places.update((name, (path, offset)) for name, offset in offsets.items())
        if count > 1:
            path = self._directory / INDEX
            total = sum(_num_bytes(name, self._shapes, self._dtype) for name in self._shapes)
            weight_map = {name: place.name for name, (place, _) in self._places.items()}
            index = {
                "metadata": {"total_size": total},
                "weight_map": weight_map,
            }
            with translated(path, "written"):
                path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write(self, where: str, name: str, tensor: Tensor) -> None:
        """Convert and write one tensor; `where` names its origin in errors.

        Raises CheckpointError if the model has no such tensor, or its shape or dtype is wrong.
        """
        if name not in self._shapes:
            raise CheckpointError(f"{where}: the model has no tensor {name}")
        check_tensor(where, name, tensor, self._shapes[name])
        dtype = stored_dtype(name, self._dtype)
        data = raw_bytes(convert_tensor(where, name, tensor, dtype))
        path, offset = self._places[name]
        with translated(path, "written"), path.open("r+b", buffering=0) as file:
            done = 0
            while done < len(data):
                done += os.pwrite(file.fileno(), data[done:].data, offset + done)
        self._written.add(name)

    def missing(self) -> list[str]:
        """The tensors that have not been written."""
        return [name for name in self._shapes if name not in self._written]


def _num_bytes(name: str, shapes: Mapping[str, Shape], dtype: torch.dtype) -> int:
    return int(np.prod(shapes[name])) * stored_dtype(name, dtype).itemsize


def _plan_shards(shapes: Mapping[str, Shape], dtype: torch.dtype, limit: int) -> list[list[str]]:
    """Cut the list of tensors where a shard would grow beyond `limit` bytes."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in shapes:
        nbytes = _num_bytes(name, shapes, dtype)
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return shards


def _header(
    names: list[str], shapes: Mapping[str, Shape], dtype: torch.dtype
) -> tuple[bytes, dict[str, int], int]:
    """The header of a file, where in the file each tensor begins, and the size of the file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    starts, end = {}, 0
    for name in names:
        starts[name] = end
        end += _num_bytes(name, shapes, dtype)
        entries[name] = {
            "dtype": DTYPE_NAMES[stored_dtype(name, dtype)],
            "shape": list(shapes[name]),
            "data_offsets": [starts[name], end],
        }
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    begin = 8 + len(text)
    offsets = {name: begin + start for name, start in starts.items()}
    return struct.pack("<Q", len(text)) + text, offsets, begin + end
