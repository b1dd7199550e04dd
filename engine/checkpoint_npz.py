"""InfMoE's archives: the experts of one MoE layer as .npz, centroids and router norm as .npy.

An archive holds, for each expert n from 0, `n/layer_norm_weight` (D,), `n/wi_0_weight` and
`n/wi_1_weight` (F, D) and `n/wo_weight` (D, F). wo is often stored in Fortran order, since a
transposed view was saved; numpy heeds the mark.

Source: the README and the weight generator of InfMoE.
"""

import re
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from numpy.lib.npyio import NpzFile
from numpy.typing import NDArray
from torch import Tensor

from engine.checkpoint_experts import check_expert, expert_bytes, expert_layout
from engine.checkpoint_tensors import Shape, translated
from engine.config import ModelConfig
from engine.errors import CheckpointError
from offload.store import create_store

MEMBERS = {
    "norm": "layer_norm_weight",
    "wi_0": "wi_0_weight",
    "wi_1": "wi_1_weight",
    "wo": "wo_weight",
}
MEMBER = re.compile(r"(0|[1-9]\d*)/(\w+)")
# what numpy raises for a damaged archive, or one that holds pickled objects
NUMPY_ERRORS = (
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    ArithmeticError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)
FLOATS = ("float16", "float32", "float64")


def read_experts(path: Path, config: ModelConfig) -> Iterator[dict[str, Tensor]]:
    """The experts of an archive in order, one in memory at a time.

    Raises CheckpointError if members are missing, left over, misshapen or damaged, or the number of
    experts is not that of the config. Pickled objects are refused, not run.
    """
    # numpy leaks a file that it opened itself and found damaged
    with translated(path, "read"), path.open("rb") as file, _open(path, file) as archive:
        _check_members(path, archive.files, config)
        for expert in range(config.num_experts):
            tensors = {
                name: _tensor(path, archive, f"{expert}/{member}")
                for name, member in MEMBERS.items()
            }
            check_expert(f"{path}: expert {expert}", tensors, config.expert_shapes())
            yield tensors


def convert_archive(
    path: Path, layer: str, config: ModelConfig, dtype: torch.dtype, destination: Path
) -> None:
    """Write the experts of an archive as the expert store of a layer ('encoder-0').

    Raises CheckpointError as `read_experts` does, or if the store cannot be written.
    """
    layout = expert_layout(config, dtype)
    with (
        translated(destination, "written"),
        create_store(destination, layer, layout, config.num_experts) as store,
    ):
        for expert, tensors in enumerate(read_experts(path, config)):
            where = f"{path}: expert {expert}"
            store.write(expert, expert_bytes(where, tensors, config, dtype))
        store.finish()


def read_centroids(path: Path, config: ModelConfig, *, transposed: bool = False) -> Tensor:
    """Read the centroids of a layer from a .npy file, as (E, D).

    `transposed`: the file holds (D, E), as InfMoE's README has it against its code. It has to be
    said, since nothing tells the two apart where E equals D.
    Raises CheckpointError if the shape is another one.
    """
    expected = (config.num_experts, config.d_model)
    array = _load_array(path, expected[::-1] if transposed else expected)
    return torch.from_numpy(np.ascontiguousarray(array.T if transposed else array))


def read_router_norm(path: Path, config: ModelConfig) -> Tensor:
    """Read the norm before the router of a layer, (D,), from a .npy file."""
    return torch.from_numpy(_load_array(path, (config.d_model,)))


def _open(path: Path, file: BinaryIO) -> NpzFile:
    try:
        archive = np.load(file, allow_pickle=False)
    except NUMPY_ERRORS as error:
        raise CheckpointError(f"{path}: truncated or no .npz archive ({error})") from error
    if not isinstance(archive, NpzFile):
        raise CheckpointError(f"{path}: is no .npz archive")
    return archive


def _check_members(path: Path, names: list[str], config: ModelConfig) -> None:
    if set(MEMBERS) != set(config.expert_shapes()):
        raise CheckpointError(f"{path}: InfMoE's experts are gated, those of the config are not")
    experts = {int(match[1]) for name in names if (match := MEMBER.fullmatch(name))}
    if experts != set(range(config.num_experts)):
        raise CheckpointError(
            f"{path}: has {len(experts)} experts, expected {config.num_experts}, numbered from 0"
        )
    needed = {f"{expert}/{member}" for expert in experts for member in MEMBERS.values()}
    if wrong := sorted(needed ^ set(names)):
        state = "is missing" if wrong[0] in needed else "is unknown"
        raise CheckpointError(f"{path}: {wrong[0]} {state}")


def _tensor(path: Path, archive: NpzFile, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(archive[name]))
    except NUMPY_ERRORS as error:
        raise CheckpointError(f"{path}: {name} is damaged or no array ({error})") from error


def _load_array(path: Path, expected: Shape) -> NDArray[np.floating]:
    with translated(path, "read"), path.open("rb") as file:
        try:
            array = np.load(file, allow_pickle=False)
        except NUMPY_ERRORS as error:
            raise CheckpointError(f"{path}: truncated or no .npy file ({error})") from error
    if not isinstance(array, np.ndarray):
        raise CheckpointError(f"{path}: is an archive, expected one array")
    if array.shape != expected or str(array.dtype) not in FLOATS:
        raise CheckpointError(
            f"{path}: holds {array.dtype} {array.shape}, expected floats {expected}"
        )
    return array
