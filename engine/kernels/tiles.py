"""Products of many rows in the matrix unit of newer Xeons (AMX), of a bf16 matrix as it is stored.

A tile of the matrix is 16 outputs of 32 numbers; rows are packed into tiles of 32 numbers by 16
rows, in pairs. Sums are in fp32. What a row gets does not depend on the others.

Source: Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1, chapter 18.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from engine.kernels.compiled import compiled, inlined
from engine.kernels.memory import floats
from engine.kernels.processor import has_tiles
from engine.kernels.vectors import (
    F32,
    I8,
    I32,
    VECTOR,
    Loop,
    ask_ahead,
    at,
    declare,
    load,
    number,
)

OUTPUTS, ROWS, DEPTH = 16, 16, 32  # of a tile
TILE_BYTES = 1024
SUM_BYTES = 2 * TILE_BYTES  # what sums need


def call(builder: ir.IRBuilder, name: str, *arguments: Any) -> None:
    """Call an instruction of this kind of processor."""
    function = declare(
        builder, f"llvm.x86.{name}", ir.VoidType(), *(value.type for value in arguments)
    )
    builder.call(function, arguments)


def tile_number(index: int) -> ir.Constant:
    """A tile, as instructions name it."""
    return ir.Constant(I8, index)


def pointer_to(builder: ir.IRBuilder, address: Any, offset: Any) -> Any:
    """The pointer to a place, as instructions take it."""
    return builder.inttoptr(builder.add(address, offset), I8.as_pointer())


@inlined
def configure(_context: Any, address: Any) -> tuple[Any, Any]:
    """Set the shapes of tiles, from 64 bytes."""

    def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
        call(builder, "ldtilecfg", pointer_to(builder, arguments[0], number(0)))
        return context.get_dummy_value()

    return types.void(types.int64), generate


@inlined
def release(_context: Any) -> tuple[Any, Any]:
    """Give the tiles up."""

    def generate(context: Any, builder: ir.IRBuilder, _: Any, __: Any) -> Any:
        call(builder, "tilerelease")
        return context.get_dummy_value()

    return types.void(), generate


def _make_sums(num_groups: int) -> Any:
    """Products of 16 outputs with some groups of 16 packed rows.

    Arguments: rows, matrix, its stride, out, tiles of a row. `out` gets a tile per group: by
    outputs, 16 rows each. More outputs at once are slower: 14 GB/s of the matrix with one tile, 11
    with four.
    """

    @inlined
    def sums(_context: Any, x: Any, w: Any, ws: Any, out: Any, depth: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
            x, w, ws, out, depth = arguments
            matrix = tile_number(2 * num_groups)
            for i in range(num_groups):
                call(builder, "tilezero", tile_number(i))
            group = builder.mul(depth, number(TILE_BYTES))
            loop = Loop(builder, number(0), [])
            loop.begin(builder.sub(depth, number(1)))
            offset = builder.mul(loop.index, number(2 * DEPTH))
            call(builder, "tileloadd64", matrix, pointer_to(builder, w, offset), ws)
            for i in range(num_groups):
                here = builder.add(x, builder.mul(group, number(i)))
                place = pointer_to(builder, here, builder.mul(loop.index, number(TILE_BYTES)))
                call(builder, "tileloadd64", tile_number(num_groups + i), place, number(2 * DEPTH))
                call(builder, "tdpbf16ps", tile_number(i), matrix, tile_number(num_groups + i))
            for row in range(OUTPUTS):
                ahead = builder.add(w, builder.mul(ws, number(OUTPUTS + row)))
                ask_ahead(builder, ahead, offset)
            loop.close(1, [])
            for i in range(num_groups):
                place = pointer_to(builder, out, number(TILE_BYTES * i))
                call(builder, "tilestored64", tile_number(i), place, number(4 * ROWS))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5), generate

    return sums


ONE_GROUP, TWO_GROUPS = _make_sums(1), _make_sums(2)


def _transposed(builder: ir.IRBuilder, rows: list[Any]) -> list[Any]:
    """16 vectors of 16 numbers, by columns."""
    step = ROWS // 2
    while step:
        for i in range(ROWS):
            if i & step:
                continue
            low, high = rows[i], rows[i | step]
            first = [lane if not lane & step else ROWS + (lane ^ step) for lane in range(ROWS)]
            second = [lane | step if not lane & step else ROWS + lane for lane in range(ROWS)]
            rows[i], rows[i | step] = (
                builder.shuffle_vector(low, high, ir.Constant(ir.VectorType(I32, ROWS), lanes))
                for lanes in (first, second)
            )
        step //= 2
    return rows


def _nearest(builder: ir.IRBuilder, numbers: Any) -> Any:
    """The bits of fp32 whose upper half is the nearest bf16, the even one of two; NaN stays."""
    lanes = numbers.type.count
    wide = ir.VectorType(I32, lanes)

    def all_of(value: int) -> ir.Constant:
        return ir.Constant(wide, [value] * lanes)

    bits = builder.bitcast(numbers, wide)
    even = builder.and_(builder.lshr(bits, all_of(16)), all_of(1))
    nearest = builder.add(builder.add(bits, all_of(0x7FFF)), even)
    is_number = builder.fcmp_ordered("ord", numbers, numbers)
    return builder.select(is_number, nearest, all_of(0x7FC00000))


def rounded_pairs(builder: ir.IRBuilder, low: Any, high: Any) -> Any:
    """Pairs of bf16 of two vectors of fp32."""
    wide = ir.VectorType(I32, low.type.count)
    upper = ir.Constant(wide, [0xFFFF0000] * low.type.count)
    first = builder.lshr(_nearest(builder, low), ir.Constant(wide, [16] * low.type.count))
    return builder.or_(first, builder.and_(_nearest(builder, high), upper))


def _neighbours(builder: ir.IRBuilder, address: Any, offset: Any) -> Any:
    """32 numbers of fp32 as 16 pairs of bf16."""
    some = ir.VectorType(F32, DEPTH)
    numbers = builder.load(at(builder, address, offset, some))
    numbers.align = 4
    nowhere = ir.Constant(some, ir.Undefined)
    low, high = (
        builder.shuffle_vector(
            numbers,
            nowhere,
            ir.Constant(ir.VectorType(I32, DEPTH // 2), list(range(half, DEPTH, 2))),
        )
        for half in range(2)
    )
    return rounded_pairs(builder, low, high)


@inlined
def _pack_tile(_context: Any, x: Any, xs: Any, last: Any, out: Any) -> tuple[Any, Any]:
    """Pack 32 numbers of 16 rows into a tile; behind row `last`, that one again."""

    def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
        x, xs, last, out = arguments
        rows = []
        for i in range(ROWS):
            is_there = builder.icmp_signed("<=", number(i), last)
            row = builder.select(is_there, number(i), last)
            rows.append(_neighbours(builder, x, builder.mul(row, xs)))
        for i, pairs in enumerate(_transposed(builder, rows)):
            place = at(builder, out, number(2 * DEPTH * i), pairs.type)
            builder.store(pairs, place).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 4), generate


def _make_put(*, adds: bool) -> Any:
    """Write a tile of sums, which stand by outputs, to 16 rows, or add it to them.

    Arguments: tile, out, its stride.
    """

    @inlined
    def put(_context: Any, tile: Any, out: Any, os: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
            tile, out, os = arguments
            columns = [load(builder, "fp32", tile, number(4 * ROWS * i)) for i in range(OUTPUTS)]
            for i, row in enumerate(_transposed(builder, columns)):
                offset = builder.mul(os, number(i))
                made = builder.fadd(load(builder, "fp32", out, offset), row) if adds else row
                builder.store(made, at(builder, out, offset, VECTOR)).align = 4
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return put


put_tile, add_tile = _make_put(adds=False), _make_put(adds=True)


@compiled
def pack(x: int, xs: int, num_rows: int, length: int, out: int) -> None:
    """Pack rows of fp32 as bf16 into tiles. What fills the last group of rows has no meaning.

    `length` is a multiple of 32. `out` gets 2 * length bytes for each row of whole groups.
    """
    for first in range(0, num_rows, ROWS):
        last = min(num_rows - first, ROWS) - 1
        for i in range(0, length, DEPTH):
            there = out + 2 * first * length + TILE_BYTES * (i // DEPTH)
            _pack_tile(x + first * xs + 4 * i, xs, last, there)


@compiled
def _put(tile: int, out: int, os: int, num_rows: int) -> None:
    """Write sums of a group to its rows."""
    if num_rows >= ROWS:
        put_tile(tile, out, os)
        return
    numbers = floats(tile, OUTPUTS * ROWS)
    for row in range(num_rows):
        target = floats(out + row * os, OUTPUTS)
        for n in range(OUTPUTS):
            target[n] = numbers[n * ROWS + row]


@compiled
def set_shapes() -> None:
    """Let all tiles be whole."""
    shapes = np.zeros(64, np.uint8)
    shapes[0] = 1
    for i in range(8):
        shapes[16 + 2 * i], shapes[48 + i] = 2 * DEPTH, OUTPUTS
    configure(shapes.ctypes.data)


def _multiply_in_tiles(  # noqa: PLR0913  two matrices, where they lie, and where to
    x: int,
    w: int,
    ws: int,
    out: int,
    os: int,
    length: int,
    num_rows: int,
    begin: int,
    end: int,
    scratch: int,
) -> int:
    """Write outputs from `begin` on of packed rows, as many as fill tiles. Returns where they end.

    `scratch` has room for two tiles.
    """
    set_shapes()
    n = begin
    while n + OUTPUTS <= end:
        row = 0
        while row < num_rows:
            rows, there = x + 2 * row * length, out + row * os + 4 * n
            if num_rows - row > ROWS:
                TWO_GROUPS(rows, w + n * ws, ws, scratch, length // DEPTH)
                _put(scratch, there, os, ROWS)
                _put(scratch + TILE_BYTES, there + ROWS * os, os, num_rows - row - ROWS)
                row += 2 * ROWS
            else:
                ONE_GROUP(rows, w + n * ws, ws, scratch, length // DEPTH)
                _put(scratch, there, os, num_rows - row)
                row += ROWS
        n += OUTPUTS
    release()
    return n


def _multiply_nothing(  # noqa: PLR0913  as the other
    x: int,
    w: int,
    ws: int,
    out: int,
    os: int,
    length: int,
    num_rows: int,
    begin: int,
    end: int,
    scratch: int,
) -> int:
    """Where there is no such unit: what would use it could not be compiled."""
    return begin


multiply_in_tiles = compiled(_multiply_in_tiles if has_tiles() else _multiply_nothing)
