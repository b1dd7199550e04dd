"""Weights of 8 bits that share a scale by blocks, as DeepSeek-V3 and others are released.

Source: DeepSeek-V3 (arXiv:2412.19437) s3.3.2 and its released files: a product's `weight` is E4M3,
`weight_scale_inv` is what each block of 128 by 128 is multiplied by.
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint_hf_config import Values, read_integer, read_list
from engine.checkpoint_hf_files import Tensors, read_part
from engine.checkpoint_hf_recipes import Stored
from engine.checkpoint_tensors import Shape
from engine.errors import CheckpointError, ConfigError

BLOCK = "weight_block_size"
SCALES = "_scale_inv"
FP8 = torch.float8_e4m3fn


def read_fp8_block(values: Values) -> tuple[int, int] | None:
    """Rows and columns that share a scale, by config.json; None if its weights are not fp8.

    Raises ConfigError if they are fp8 of another kind.
    """
    told = values.get("quantization_config")
    if not isinstance(told, dict) or told.get("quant_method") != "fp8":
        return None
    if told.get("fmt", "e4m3") != "e4m3":
        raise ConfigError(f"fp8 weights of format {told['fmt']!r} are not supported; e4m3 are")
    block = read_list(told, BLOCK, int)
    if block is None or len(block) != 2:
        raise ConfigError(
            f"fp8 weights with weight_block_size {told.get(BLOCK)!r} are not "
            "supported; it must be two numbers, rows and columns that share a scale"
        )
    rows, columns = (read_integer({BLOCK: number}, BLOCK) for number in block)
    if min(rows, columns) < 1:
        raise ConfigError(f"weight_block_size is {[rows, columns]}; it must be at least 1 by 1")
    return rows, columns


def dequantize_fp8(weight: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """The matrix (N, K) in fp32; blocks at its lower and right edge may be cut off.

    A weight of (3, 5) in blocks of (2, 4) has scales (2, 2); that of row 2, column 4 is (1, 1).
    """
    # no more than the matrix has, which a block may be larger than
    high, wide = (min(size, step) for size, step in zip(weight.shape, block, strict=True))
    rows = scales.float().repeat_interleave(high, 0)[: weight.shape[0]]
    each = rows.repeat_interleave(wide, 1)[:, : weight.shape[1]]
    return weight.float() * each


class Fp8Tensors:
    """Named tensors of which those with scales are dequantised when they are read.

    They are given in fp32, and said to be of bf16: so much is left of them.
    """

    def __init__(self, where: Path, tensors: Tensors, block: tuple[int, int]) -> None:
        self._where = where
        self._tensors = tensors
        self._block = block
        names = {*tensors.names()}
        self._scaled = {name for name in names if name + SCALES in names}

    @property
    def files(self) -> tuple[Path, ...]:
        """The files."""
        return self._tensors.files

    def names(self) -> list[str]:
        """The keys but those of scales, sorted."""
        scales = {name + SCALES for name in self._scaled}
        return [name for name in self._tensors.names() if name not in scales]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype that holds a tensor."""
        return torch.bfloat16 if name in self._scaled else self._tensors.dtype(name)

    def shape(self, name: str) -> Shape:
        """Shape of a tensor that is not read."""
        return self._tensors.shape(name)

    def tensor(self, name: str) -> Tensor:
        """Read a tensor.

        Raises CheckpointError if it and its scales do not fit each other, or give no numbers.
        """
        if name not in self._scaled:
            return self._tensors.tensor(name)
        read = partial(read_part, self._where, self._tensors)
        shape = self.shape(name)
        if len(shape) != 2:
            raise CheckpointError(f"{self._where}: {name} has scales, and shape {list(shape)}")
        grid = tuple(-(-size // step) for size, step in zip(shape, self._block, strict=True))
        weight = read(Stored(name, shape, dtype=FP8))
        made = dequantize_fp8(weight, read(Stored(name + SCALES, grid)), self._block)
        if not made.isfinite().all():  # one scale spoils a whole block, and with it every answer
            raise CheckpointError(
                f"{self._where}: {name} or its scales hold what is no number; download it again"
            )
        return made

    def row(self, name: str, index: int) -> Tensor:
        """One of a tensor's first dimension."""
        return self.tensor(name)[index]
