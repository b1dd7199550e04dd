"""Experts of 8 or 4 bits per element: which sizes can be, what is stored, how it is computed.

The same weights give the same bytes on every machine: nothing here depends on the order in which a
processor sums, and the order of packed bytes is our own (engine/model/quantized.py).

Shape letters: N outputs, K inputs, G groups of inputs, C inputs of a group.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.quantized import (
    GROUP_SIZES,
    INPUT_MULTIPLES,
    Int4Matrix,
    Int8Matrix,
    pack_int4,
)
from offload.layout import Quantization

SCALE = {"int8": "_scale", "int4": "_scale_zero"}  # suffix of the name of what belongs to a matrix
CHUNK_OUTPUTS = 256  # quantised at once, for which 4 MiB of float32 at 4096 inputs pass a few times
# Shares of a group's range, besides the whole, that its 16 levels may span. In groups of 128
# normally distributed weights they lower the error from 10.0% to 9.4%; the last are for outliers.
CLIPPING = (0.95, 0.9, 0.85, 0.8, 0.7)


def check_sizes(config: ModelConfig, quantization: Quantization) -> None:
    """Raise ConfigError, telling what is allowed, if the experts of a model cannot be quantised."""
    if quantization == "none":
        return
    if not config.num_experts:
        raise ConfigError(f"the model is dense; it has no experts to be stored as {quantization}")
    multiple = INPUT_MULTIPLES[quantization]
    inner = "expert_d_ff" if config.expert_d_ff else "d_ff"
    for name in ("d_model", inner):
        if getattr(config, name) % multiple:
            raise ConfigError(
                f"{name} is {getattr(config, name)}; {quantization} experts need d_model and "
                f"{inner} that are multiples of {multiple}"
            )


def group_size(config: ModelConfig) -> int:
    """Inputs that share scale and zero in int4: 128, or less where that does not divide."""
    fitting = (c for c in GROUP_SIZES if config.d_model % c == config.expert_width % c == 0)
    return next(fitting)


def stored_tensors(
    config: ModelConfig, norm_dtype: str, quantization: Quantization
) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The tensors of a quantised expert in a blob, in order: name -> (dtype name, shape).

    int8: `wi_0` (N, K) and `wi_0_scale` (N,); int4: `wi_0` (N, K / 2) and `wi_0_scale_zero`
    (G, N, 2). Norm and biases stay as they are.
    Raises ConfigError if experts of these sizes cannot be quantised.
    """
    check_sizes(config, quantization)
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for name, shape in config.expert_shapes().items():
        if len(shape) == 1:
            tensors[name] = (norm_dtype, shape)
        elif quantization == "int8":
            tensors[name] = ("I8", shape)
            tensors[name + SCALE["int8"]] = ("BF16", shape[:1])
        else:
            outputs, inputs = shape
            tensors[name] = ("U8", (outputs, inputs // 2))
            groups = inputs // group_size(config)
            tensors[name + SCALE["int4"]] = ("BF16", (groups, outputs, 2))
    return tensors


def quantize_matrices(
    tensors: Mapping[str, Tensor], config: ModelConfig, quantization: Quantization
) -> dict[str, Tensor]:
    """All that is stored of an expert but its vectors, by name.

    Raises ValueError, naming the matrix, if it holds a number that is not finite.
    """
    stored: dict[str, Tensor] = {}
    for name, shape in config.expert_shapes().items():
        if len(shape) == 1:
            continue
        if not all(part.isfinite().all() for part in torch.split(tensors[name], CHUNK_OUTPUTS)):
            raise ValueError(f"{name} has infinite values or NaN, which {quantization} cannot hold")
        if quantization == "int8":
            int8 = quantize_int8(tensors[name])
            stored[name], stored[name + SCALE["int8"]] = int8.q_NK, int8.scale_N
        else:
            int4 = quantize_int4(tensors[name], group_size(config))
            stored[name], stored[name + SCALE["int4"]] = int4.packed, int4.scale_zero_GN2
    return stored


def quantize_int8(weight_NK: Tensor) -> Int8Matrix:
    """Round each row to 255 levels, symmetric to 0; the largest element of a row is level 127.

    The scale is rounded to bfloat16 before it is used. An element is off by scale / 2 at most.
    """
    q_NK = torch.empty(weight_NK.shape, dtype=torch.int8)
    scale_N = torch.empty(len(weight_NK), dtype=torch.bfloat16)
    for rows in _chunks(len(weight_NK)):
        wide_NK = weight_NK[rows].float()
        scale_N[rows] = wide_NK.abs().amax(1) / 127
        scale_N1 = _divisor(scale_N[rows].float()).unsqueeze(1)
        q_NK[rows] = (wide_NK / scale_N1).round_().clamp_(-127, 127).to(torch.int8)
    return Int8Matrix(q_NK, scale_N)


def quantize_int4(weight_NK: Tensor, group: int) -> Int4Matrix:
    """Round each group of inputs to 16 levels, spread over the share of its range that fits best.

    Best is the least sum of squared errors. Scale and zero are rounded to bfloat16 before they are
    used: each element becomes the level nearest to it.
    """
    outputs, inputs = weight_NK.shape
    q_NK = torch.empty(outputs, inputs, dtype=torch.uint8)
    scale_zero_GN2 = torch.empty(inputs // group, outputs, 2, dtype=torch.bfloat16)
    for rows in _chunks(outputs):
        wide_NGC = weight_NK[rows].float().reshape(-1, inputs // group, group)
        scale_NG1, zero_NG1 = _best_levels(wide_NGC)
        q_NK[rows] = (_nearest_level(wide_NGC, scale_NG1, zero_NG1) + 8).flatten(1).to(torch.uint8)
        scale_zero_GN2[:, rows] = torch.cat([scale_NG1, zero_NG1], -1).transpose(0, 1).bfloat16()
    return Int4Matrix(pack_int4(q_NK), scale_zero_GN2)


def _best_levels(wide_NGC: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, (N, G, 1), as float32 that bfloat16 holds."""
    low_NG1, high_NG1 = torch.aminmax(wide_NGC, dim=-1, keepdim=True)
    middle_NG1, step_NG1 = low_NG1 / 2 + high_NG1 / 2, high_NG1 / 15 - low_NG1 / 15
    best = _try_levels(wide_NGC, middle_NG1, step_NG1)
    for share in CLIPPING:
        other = _try_levels(wide_NGC, middle_NG1, step_NG1 * share)
        is_better_NG1 = other.error < best.error
        best = Levels(
            *(torch.where(is_better_NG1, new, old) for new, old in zip(other, best, strict=True))
        )
    return best.scale, best.zero


class Levels(NamedTuple):
    """Scale and zero of each group, and the sum of squared errors with them; each (N, G, 1)."""

    scale: Tensor
    zero: Tensor
    error: Tensor


def _try_levels(wide_NGC: Tensor, middle_NG1: Tensor, step_NG1: Tensor) -> Levels:
    scale_NG1 = step_NG1.bfloat16().float()
    zero_NG1 = (middle_NG1 + scale_NG1 / 2).bfloat16().float()  # levels -8..7 lie around -0.5
    error_NGC = _nearest_level(wide_NGC, scale_NG1, zero_NG1)
    error_NGC.mul_(scale_NG1).add_(zero_NG1).sub_(wide_NGC).square_()
    while (half := error_NGC.shape[-1] // 2) > 0:  # in the same order on every machine
        error_NGC = error_NGC[..., :half] + error_NGC[..., half:]
    return Levels(scale_NG1, zero_NG1, error_NGC)


def _nearest_level(wide_NGC: Tensor, scale_NG1: Tensor, zero_NG1: Tensor) -> Tensor:
    """Levels -8..7, as float32."""
    return (wide_NGC - zero_NG1).div_(_divisor(scale_NG1)).round_().clamp_(-8, 7)


def _divisor(scale: Tensor) -> Tensor:
    """The scale, or 1 where all elements are equal or all but 0."""
    return torch.where(scale == 0, 1.0, scale)


def _chunks(outputs: int) -> list[slice]:
    return [slice(begin, begin + CHUNK_OUTPUTS) for begin in range(0, outputs, CHUNK_OUTPUTS)]
