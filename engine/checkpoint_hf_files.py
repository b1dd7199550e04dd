"""The weights of a Hugging Face directory: safetensors, or pickles where those are allowed."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoint_hf_recipes import Stored
from engine.checkpoint_tensors import (
    DTYPE_NAMES,
    INDEX,
    SINGLE,
    Shape,
    check_tensor,
    open_tensor_files,
    read_index,
)
from engine.errors import CheckpointError
from engine.pickles import load_state

PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"


class Tensors(Protocol):
    """Named tensors of open files, read one at a time."""

    @property
    def files(self) -> tuple[Path, ...]: ...
    def names(self) -> list[str]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def shape(self, name: str) -> Shape: ...
    def tensor(self, name: str) -> Tensor: ...
    def row(self, name: str, index: int) -> Tensor: ...


class PickledTensors:
    """The tensors of open pickle files."""

    def __init__(self, files: tuple[Path, ...], state: Mapping[str, Tensor]) -> None:
        self.files = files
        self._state = state

    def names(self) -> list[str]:
        """The keys, sorted."""
        return sorted(self._state)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._state[name].dtype

    def shape(self, name: str) -> Shape:
        """Shape of a tensor."""
        return tuple(self._state[name].shape)

    def tensor(self, name: str) -> Tensor:
        """A tensor, which may be mapped from its file."""
        return self._state[name]

    def row(self, name: str, index: int) -> Tensor:
        """One of a tensor's first dimension."""
        return self._state[name][index]


def open_weights(
    directory: Path, is_ignored: Callable[[str], bool], *, allow_pickles: bool
) -> Tensors:
    """Open the weights of a directory. Raises CheckpointError if there are none that may be read.

    Pickles are read whole, but for the ignored keys, and hold floats alone.
    """
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        return open_tensor_files(directory)
    single, index = directory / PICKLE, directory / PICKLE_INDEX
    if not single.exists() and not index.exists():
        raise CheckpointError(f"{directory}: has no weights; expected {SINGLE} or {INDEX}")
    if not allow_pickles:
        raise CheckpointError(
            f"{directory}: has its weights as pickles only; run `infmoe convert` on it first"
        )
    files = sorted(set(read_index(index).values())) if index.exists() else [single]
    state: dict[str, Tensor] = {}
    for path in files:
        read = load_state(path)
        state |= {key: tensor for key, tensor in read.items() if not is_ignored(key)}
    if other := sorted(key for key, tensor in state.items() if tensor.dtype not in DTYPE_NAMES):
        raise CheckpointError(
            f"{directory}: {other[0]} is {state[other[0]].dtype}, expected floats"
        )
    return PickledTensors(tuple(files), state)


def read_part(directory: Path, tensors: Tensors, part: Stored) -> Tensor:
    """Read a tensor, or the wanted row of it. Raises CheckpointError if shape or dtype is wrong."""
    where, shape = str(directory), part.shape
    if part.row is None:
        tensor = tensors.tensor(part.key)
    elif tensors.shape(part.key) != shape:
        found = list(tensors.shape(part.key))
        raise CheckpointError(
            f"{where}: {part.key} has shape {found}, expected {list(shape)} by config"
        )
    else:
        tensor, shape = tensors.row(part.key, part.row), shape[1:]
    if part.dtype is None or tensor.dtype != part.dtype:
        check_tensor(where, part.key, tensor, shape)
    if part.dtype is not None and tensor.dtype != part.dtype:
        raise CheckpointError(f"{where}: {part.key} is {tensor.dtype}, expected {part.dtype}")
    return tensor
