"""Memory as compiled functions see it: addresses of numbers, and words that threads share."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types  # type: ignore[attr-defined]

from engine.kernels.compiled import compiled, inlined
from engine.kernels.ops import FP32
from engine.kernels.vectors import F32, I8, I32, I64, at, declare, number

HALF = 16  # bits by which bf16 is shorter than fp32


@inlined
def pointer(_context: Any, address: Any) -> tuple[Any, Any]:
    """An address as a pointer."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], I8.as_pointer())

    return types.voidptr(types.int64), generate


@inlined
def bits_of(_context: Any, value: Any) -> tuple[Any, Any]:
    """The bits of an fp32."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], I32)

    return types.uint32(types.float32), generate


@inlined
def float_of(_context: Any, value: Any) -> tuple[Any, Any]:
    """The fp32 of some bits."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], F32)

    return types.float32(types.uint32), generate


@inlined
def add_shared(_context: Any, address: Any, value: Any) -> tuple[Any, Any]:
    """Add to a word that threads share; returns what it was."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        place = at(builder, arguments[0], number(0), I64)
        return builder.atomic_rmw("add", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@inlined
def swap_shared(_context: Any, address: Any, value: Any) -> tuple[Any, Any]:
    """Set a word that threads share; returns what it was."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        place = at(builder, arguments[0], number(0), I64)
        return builder.atomic_rmw("xchg", place, arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@inlined
def get_shared(_context: Any, address: Any) -> tuple[Any, Any]:
    """Read a word that threads share."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        return builder.load_atomic(at(builder, arguments[0], number(0), I64), "seq_cst", 8)

    return types.int64(types.int64), generate


def _call_library(builder: ir.IRBuilder, name: str, address: Any = None) -> Any:
    """Call a function of the C library that takes an address or nothing."""
    given = [] if address is None else [builder.inttoptr(address, I8.as_pointer())]
    function = declare(builder, name, I32, *(value.type for value in given))
    return builder.sext(builder.call(function, given), I64)


@inlined
def wait_semaphore(_context: Any, address: Any) -> tuple[Any, Any]:
    """Sleep until a semaphore was posted."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        return _call_library(builder, "sem_wait", arguments[0])

    return types.int64(types.int64), generate


@inlined
def post_semaphore(_context: Any, address: Any) -> tuple[Any, Any]:
    """Wake who waits for a semaphore."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        return _call_library(builder, "sem_post", arguments[0])

    return types.int64(types.int64), generate


@inlined
def yield_core(_context: Any) -> tuple[Any, Any]:
    """Let another thread have this core."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, ___: Any) -> Any:
        return _call_library(builder, "sched_yield")

    return types.int64(), generate


@compiled
def floats(address: int, count: int) -> Any:
    """Numbers of fp32 at an address."""
    return carray(pointer(address), count, np.float32)


@compiled
def halves(address: int, count: int) -> Any:
    """The bits of numbers of bf16 at an address."""
    return carray(pointer(address), count, np.uint16)


@compiled
def words(address: int, count: int) -> Any:
    """Numbers of int64 at an address."""
    return carray(pointer(address), count, np.int64)


@compiled
def doubles(address: int, count: int) -> Any:
    """Numbers of fp64 at an address."""
    return carray(pointer(address), count, np.float64)


@compiled
def stored(address: int, kind: int, index: int) -> Any:
    """The number at an index."""
    if kind == FP32:
        return floats(address, index + 1)[index]
    return float_of(np.uint32(halves(address, index + 1)[index]) << np.uint32(HALF))


@compiled
def multiply_by(x: int, count: int, factor: float, weight: int, kind: int) -> None:
    """Multiply numbers by a factor, and by as many weights."""
    numbers = floats(x, count)
    if kind == FP32:
        weights = floats(weight, count)
        for i in range(count):
            numbers[i] = numbers[i] * factor * weights[i]
        return
    bits = halves(weight, count)
    for i in range(count):
        numbers[i] = numbers[i] * factor * float_of(np.uint32(bits[i]) << np.uint32(HALF))


@compiled
def add_stored(x: int, count: int, other: int, kind: int) -> None:
    """Add stored numbers to others."""
    numbers = floats(x, count)
    if kind == FP32:
        others = floats(other, count)
        for i in range(count):
            numbers[i] += others[i]
        return
    bits = halves(other, count)
    for i in range(count):
        numbers[i] += float_of(np.uint32(bits[i]) << np.uint32(HALF))


@compiled
def rounded(value: float) -> Any:
    """The bits of the nearest bf16, the even one of two; NaN stays."""
    bits = bits_of(value)
    if value != value:
        return np.uint16(0x7FC0)
    even = (bits >> np.uint32(HALF)) & np.uint32(1)
    return np.uint16((bits + np.uint32(0x7FFF) + even) >> np.uint32(HALF))


@compiled
def store(x: int, count: int, out: int, kind: int) -> None:
    """Store numbers at an address."""
    numbers = floats(x, count)
    if kind == FP32:
        targets = floats(out, count)
        for i in range(count):
            targets[i] = numbers[i]
        return
    bits = halves(out, count)
    for i in range(count):
        bits[i] = rounded(numbers[i])
