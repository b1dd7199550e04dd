"""Reading torch pickle files without ever running what they contain.

torch's restricted unpickler rebuilds tensors and plain containers; all else is refused by name. The
few numpy types below are allowed in addition: training frameworks store numpy's random state.
"""

import pickle
import re
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.errors import CheckpointError

REBUILD_ARRAY = np.empty(0).__reduce__()[0]
assert callable(REBUILD_ARRAY)  # numpy's stubs allow a str
# numpy 1 and numpy 2 name the module differently; the dtypes are those of numpy.random.get_state()
ALLOWED_GLOBALS: list[Callable[..., object] | tuple[Callable[..., object], str]] = [
    (REBUILD_ARRAY, "numpy.core.multiarray._reconstruct"),
    (REBUILD_ARRAY, "numpy._core.multiarray._reconstruct"),
    (np.ndarray, "numpy.ndarray"),
    (np.dtype, "numpy.dtype"),
    (np.dtypes.UInt32DType, "numpy.dtypes.UInt32DType"),
    (np.dtypes.Int64DType, "numpy.dtypes.Int64DType"),
    (np.dtypes.Float64DType, "numpy.dtypes.Float64DType"),
]
ZIP_MAGIC = b"PK\x03\x04"
# what a damaged or hostile file makes torch.load raise
LOAD_ERRORS = (
    pickle.UnpicklingError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_pickle(path: Path) -> object:
    """Read a file written by torch.save, restricted; nothing in it is executed.

    Files of the zip format are mapped, so a tensor costs memory only once it is used. The older
    format (torch before 1.6) is read whole.
    Raises CheckpointError, naming the file and what was refused.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(len(ZIP_MAGIC)) == ZIP_MAGIC
        if is_zip and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: truncated; copy or download it again")
        with warnings.catch_warnings(), torch.serialization.safe_globals(ALLOWED_GLOBALS):
            warnings.simplefilter("ignore")  # torch warns of old protocols and of its own classes
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except OSError as error:
        reason = error.strerror or str(error)
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
    except LOAD_ERRORS as error:
        raise CheckpointError(f"{path}: {_explain(str(error))}") from error


def load_state(path: Path, places: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Read a file of named tensors, which lie under the first of `places` it has, or at its top.

    Raises CheckpointError if there is anything but tensors by name.
    """
    content = load_pickle(path)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected named tensors")
    if places:
        place = next((place for place in places if place in content), None)
        if place is None:
            raise CheckpointError(f"{path}: has no weights under {' or '.join(places)}")
        content = content[place]
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds no named tensors")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise CheckpointError(f"{path}: {name} is no tensor but a {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            raise CheckpointError(
                f"{path}: {name} is a sparse, nested or empty tensor, not a dense one"
            )
    return dict(content)


def _explain(message: str) -> str:
    refused = re.search(r"GLOBAL (\S+)", message) or re.search(r"function (<.+?>)", message)
    if refused:
        return (
            f"refused: it asks to import or call {refused[1]}, which could run any code; get the "
            "weights as safetensors, or from a source that stores tensors alone"
        )
    # torch's own text advises to load unrestricted: keep the reason, drop the advice
    reason = message.rpartition("WeightsUnpickler error:")[2].split("Check the documentation")[0]
    first_line = next((line for line in reason.strip().splitlines() if line), "it ends too early")
    return f"truncated or no torch file ({first_line.strip()}); copy or download it again"
