"""Norms of a row, in fp32."""

import math
from typing import Any

import numpy as np

from engine.kernels.compiled import compiled, compiled_loosely
from engine.kernels.memory import add_stored, floats, multiply_by

LAYER = 2  # the norm that takes the mean away first


@compiled_loosely
def sum_of(x: int, count: int) -> Any:
    """The sum of numbers."""
    total = np.float32(0)
    for value in floats(x, count):
        total += value
    return total


@compiled_loosely
def sum_of_squares(x: int, count: int) -> Any:
    """The sum of their squares."""
    total = np.float32(0)
    for value in floats(x, count):
        total += value * value
    return total


@compiled
def scale(x: int, count: int, weight: int, kind: int, eps: float) -> None:
    """Divide numbers by the root of their mean square, and multiply them by weights."""
    factor = np.float32(1 / math.sqrt(sum_of_squares(x, count) / count + eps))
    multiply_by(x, count, factor, weight, kind)


@compiled
def normalize(
    x: int, out: int, count: int, norm: int, weight: int, bias: int, kind: int, eps: float
) -> None:
    """Write the norm of a row beside it. A layer's norm has a bias, or 0."""
    source, target = floats(x, count), floats(out, count)
    mean = np.float32(sum_of(x, count) / count) if norm == LAYER else np.float32(0)
    for i in range(count):
        target[i] = source[i] - mean
    scale(out, count, weight, kind, eps)
    if bias:
        add_stored(out, count, bias, kind)
