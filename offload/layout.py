"""What lies where inside a blob: names, dtypes, shapes and places of the tensors of one expert."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

Quantization = Literal["none", "int8", "int4"]

QUANTIZATIONS: tuple[Quantization, ...] = get_args(Quantization)
PAGE_BYTES = 4096  # alignment of blobs: what O_DIRECT and page locking ask for
TENSOR_ALIGN_BYTES = 256  # alignment of tensors inside a blob: what CUDA kernels like best
# safetensors' dtype names and their widths; numpy lacks bfloat16, so this package handles raw bytes
DTYPE_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """Where one tensor lies inside a blob, in bytes. `dtype` is safetensors' name for it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    def __post_init__(self) -> None:
        if type(self.name) is not str:
            raise ValueError(f"a tensor is named {self.name!r}, which is no text")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"tensor {self.name}: dtype {self.dtype!r} is unknown")
        numbers = (*self.shape, self.offset, self.nbytes)
        if any(type(number) is not int or number < 0 for number in numbers):
            raise ValueError(f"tensor {self.name}: shape or place is no whole number")
        if self.nbytes != math.prod(self.shape) * DTYPE_BYTES[self.dtype]:
            raise ValueError(f"tensor {self.name}: {self.nbytes} bytes do not fit its shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlobLayout:
    """What a blob holds. All blobs of a store have one layout.

    `quantization` tells how the tensors make matrices; this package does not need to know.
    """

    tensors: tuple[TensorSpec, ...]
    blob_bytes: int
    quantization: Quantization = "none"

    def __post_init__(self) -> None:
        size = self.blob_bytes
        if type(size) is not int or size < PAGE_BYTES or size % PAGE_BYTES:
            raise ValueError(f"blob_bytes {size} is no multiple of {PAGE_BYTES}")
        if self.quantization not in QUANTIZATIONS:
            raise ValueError(
                f"quantization {self.quantization!r} is unknown; known: "
                f"{', '.join(QUANTIZATIONS)}; upgrade InfMoE"
            )
        end = 0
        for tensor in self.tensors:
            if tensor.offset < end:
                raise ValueError(f"tensor {tensor.name} overlaps the one before it")
            end = tensor.offset + tensor.nbytes
        if end > self.blob_bytes:
            raise ValueError(f"{end} bytes of tensors do not fit a blob of {self.blob_bytes}")

    def to_json(self) -> str:
        """Text that `layout_from_json` reads."""
        return json.dumps(asdict(self))


def make_layout(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], quantization: Quantization = "none"
) -> BlobLayout:
    """Place tensors, given as name -> (dtype name, shape), one after the other in a blob.

    Two F16 tensors of 100 elements lie at 0 and 256; the blob takes 4096 bytes.
    """
    specs, end = [], 0
    for name, (dtype, shape) in tensors.items():
        offset = round_up(end, TENSOR_ALIGN_BYTES)
        nbytes = math.prod(shape) * DTYPE_BYTES[dtype]
        specs.append(TensorSpec(name=name, dtype=dtype, shape=shape, offset=offset, nbytes=nbytes))
        end = offset + nbytes
    return BlobLayout(
        tensors=tuple(specs),
        blob_bytes=round_up(max(end, 1), PAGE_BYTES),
        quantization=quantization,
    )


def layout_from_json(text: str) -> BlobLayout:
    """Read a layout. Raises ValueError, KeyError, TypeError or AttributeError if it is none."""
    values = json.loads(text)
    tensors = values.pop("tensors")
    specs = (TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in tensors)
    return BlobLayout(tensors=tuple(specs), **values)


def round_up(value: int, multiple: int) -> int:
    """The next multiple: 5000 by 4096 is 8192."""
    return -(-value // multiple) * multiple
