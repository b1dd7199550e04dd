"""Products of many rows in the matrix unit: rows are packed first, 16 to a panel.

The panels of an expert, or of all rows where there is but one matrix, follow each other. What a
row gets does not depend on the others.
"""

from typing import Any

from llvmlite import ir
from numba import types

from engine.kernels import ops
from engine.kernels.compiled import compiled, inlined
from engine.kernels.curves import activate
from engine.kernels.memory import floats, stored, words
from engine.kernels.mixture import last_wanted
from engine.kernels.norms import normalize
from engine.kernels.processor import has_tiles
from engine.kernels.tiles import (
    DEPTH,
    OUTPUTS,
    ROWS,
    TILE_BYTES,
    add_tile,
    call,
    pack,
    pointer_to,
    put_tile,
    release,
    rounded_pairs,
    set_shapes,
    tile_number,
)
from engine.kernels.vectors import Loop, ask_ahead, at, load, number

WIDE = 2 * OUTPUTS  # outputs of a block
PANEL_SUM_BYTES = WIDE * ROWS * 4  # by outputs, 16 rows each
PANELS = 16  # of a task


def _make_block(num_panels: int) -> Any:
    """Products of 32 outputs with 1 or 2 panels.

    Arguments: panel, its bytes, matrix, its stride, out, tiles of a row, whether to ask for the
    next outputs' lines of the matrix: what is in the cache is a third slower for it. `out` gets a
    block per panel: by outputs, 16 rows each.
    """

    @inlined
    def block(
        _context: Any, x: Any, size: Any, w: Any, ws: Any, out: Any, depth: Any, ahead: Any
    ) -> tuple[Any, Any]:
        def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
            x, size, w, ws, out, depth, ahead = arguments
            for i in range(2 * num_panels):
                call(builder, "tilezero", tile_number(i))
            second = builder.add(w, builder.mul(ws, number(OUTPUTS)))
            panels = [builder.add(x, builder.mul(size, number(i))) for i in range(num_panels)]
            loop = Loop(builder, number(0), [])
            loop.begin(builder.sub(depth, number(1)))
            offset = builder.mul(loop.index, number(2 * DEPTH))
            row_offset = builder.mul(loop.index, number(TILE_BYTES))
            for i, matrix in enumerate((w, second)):
                place = pointer_to(builder, matrix, offset)
                call(builder, "tileloadd64", tile_number(4 + i), place, ws)
            for i, panel in enumerate(panels):
                rows = tile_number(6 + i)
                place = pointer_to(builder, panel, row_offset)
                call(builder, "tileloadd64", rows, place, number(2 * DEPTH))
                for half in range(2):
                    call(
                        builder, "tdpbf16ps", tile_number(2 * i + half), tile_number(4 + half), rows
                    )
            with builder.if_then(builder.icmp_signed("!=", ahead, number(0))):
                for row in range(WIDE):
                    place = builder.add(w, builder.mul(ws, number(WIDE + row)))
                    ask_ahead(builder, place, offset)
            loop.close(1, [])
            for i in range(2 * num_panels):
                place = pointer_to(builder, out, number(TILE_BYTES * i))
                call(builder, "tilestored64", tile_number(i), place, number(4 * ROWS))
            return context.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return block


ONE_PANEL, TWO_PANELS = _make_block(1), _make_block(2)


@inlined
def pack_sums(_context: Any, sums: Any, out: Any) -> tuple[Any, Any]:
    """Pack 32 outputs of 16 rows, which stand by outputs, into a tile of a panel."""

    def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
        sums, out = arguments
        for i in range(ROWS):
            low, high = (
                load(builder, "fp32", sums, number(4 * ROWS * (2 * i + half))) for half in range(2)
            )
            pairs = rounded_pairs(builder, low, high)
            place = at(builder, out, number(2 * DEPTH * i), pairs.type)
            builder.store(pairs, place).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 2), generate


@compiled
def panel_tasks(op: Any) -> Any:
    """The panels of the experts of an operation."""
    end = last_wanted(op)
    starts = words(op[ops.M_STARTS], end + 1)
    return starts[end] - starts[op[ops.M_BEGIN]]


@compiled
def pack_panel(op: Any, reals: Any, task: int, scratch: int) -> None:
    """Norm and pack the rows of a panel. `scratch` has room for them in fp32."""
    end, wanted = last_wanted(op), op[ops.M_BEGIN]
    starts, begins = words(op[ops.M_STARTS], end + 1), words(op[ops.M_BEGINS], end + 1)
    panel = starts[wanted] + task
    while starts[wanted + 1] <= panel:
        wanted += 1
    first = begins[wanted] + ROWS * (panel - starts[wanted])
    count = min(ROWS, begins[wanted + 1] - first)
    norm, weight, bias = op[ops.M_NORM], op[ops.M_NORM_WEIGHT], op[ops.M_NORM_BIAS]
    if not norm and op[ops.M_WEIGHTS]:
        expert = words(op[ops.M_IDS_WANTED], end)[wanted]
        own = words(op[ops.M_WEIGHTS] + 8 * ops.WEIGHTS * expert, ops.WEIGHTS)
        norm, weight = min(own[ops.NORM_WEIGHT], 1), own[ops.NORM_WEIGHT]
    length, eps = op[ops.M_LENGTH], reals[ops.M_EPS - ops.REALS]
    for i in range(count):
        row = first + i
        if op[ops.M_ORDER]:
            row = words(op[ops.M_ORDER], row + 1)[row] // op[ops.M_PER_ROW]
        x, out = op[ops.M_X] + row * op[ops.M_X_STRIDE], scratch + 4 * i * length
        if norm:
            normalize(x, out, length, norm, weight, bias, op[ops.KIND], eps)
        else:
            source, target = floats(x, length), floats(out, length)
            for k in range(length):
                target[k] = source[k]
    pack(scratch, 4 * length, count, length, op[ops.M_OUT] + 2 * ROWS * panel * length)


@compiled
def _blocks_of(starts: Any, wanted: int) -> Any:
    return (starts[wanted + 1] - starts[wanted] + PANELS - 1) // PANELS


@compiled
def panel_product_tasks(op: Any) -> Any:
    """The parts of outputs, times the blocks of panels of each expert."""
    end = last_wanted(op)
    starts, blocks = words(op[ops.M_STARTS], end + 1), 0
    for wanted in range(op[ops.M_BEGIN], end):
        blocks += _blocks_of(starts, wanted)
    return blocks * ((op[ops.M_OUTPUTS] + op[ops.M_CHUNK] - 1) // op[ops.M_CHUNK])


@compiled
def _sum_block(
    op: Any, weights: Any, which: int, n: int, x: int, panels: int, ahead: int, out: int
) -> None:
    """32 outputs of one matrix of an expert for some panels, with its bias."""
    kind, length = op[ops.KIND], op[ops.M_LENGTH]
    matrix, bias = weights[op[which]], weights[op[which + 1]]
    stride, size = 2 * length, 2 * ROWS * length
    if panels == 1:
        ONE_PANEL(x, size, matrix + n * stride, stride, out, length // DEPTH, ahead)
    else:
        TWO_PANELS(x, size, matrix + n * stride, stride, out, length // DEPTH, ahead)
    if bias:
        for i in range(panels * WIDE):
            value, sums = stored(bias, kind, n + i % WIDE), floats(out + 4 * ROWS * i, ROWS)
            for row in range(ROWS):
                sums[row] += value


@compiled
def _put_block(op: Any, sums: int, place: int, count: int, n: int) -> None:
    """Write 32 outputs of a panel of `count` rows, of which `place` is the first, or add them."""
    stride = op[ops.M_OUT_STRIDE]
    out = op[ops.M_OUT] + place * stride + 4 * n
    if count == ROWS:
        for half in range(2):
            if op[ops.M_HOW] == ops.ADDS:
                add_tile(sums + TILE_BYTES * half, out + 4 * OUTPUTS * half, stride)
            else:
                put_tile(sums + TILE_BYTES * half, out + 4 * OUTPUTS * half, stride)
        return
    numbers = floats(sums, WIDE * ROWS)
    for row in range(count):
        target = floats(out + row * stride, WIDE)
        for i in range(WIDE):
            made = numbers[i * ROWS + row]
            target[i] = target[i] + made if op[ops.M_HOW] == ops.ADDS else made


@compiled
def _finish(op: Any, sums: int, panel: int, panels: int, place: int, left: int, n: int) -> None:
    """Do with the sums of some panels what the operation does; `left` rows begin at a place."""
    if op[ops.M_HOW] == ops.PACKS:
        gate = sums + 2 * PANEL_SUM_BYTES if op[ops.M_GATE] else 0
        if op[ops.M_ACTIVATION]:
            activate(op[ops.M_ACTIVATION], sums, gate, panels * WIDE * ROWS)
        for i in range(panels):
            out = op[ops.M_OUT] + 2 * ROWS * (panel + i) * op[ops.M_OUTPUTS]
            pack_sums(sums + PANEL_SUM_BYTES * i, out + TILE_BYTES * (n // WIDE))
        return
    for i in range(panels):
        here = sums + PANEL_SUM_BYTES * i
        _put_block(op, here, place + ROWS * i, min(ROWS, left - ROWS * i), n)


def _multiply_panels(op: Any, task: int, scratch: int) -> None:
    """Some outputs of an expert for some of its panels: act(x * matrix) [* (x * gate)].

    `scratch` has room for four blocks of sums.
    """
    end, wanted = last_wanted(op), op[ops.M_BEGIN]
    starts, begins = words(op[ops.M_STARTS], end + 1), words(op[ops.M_BEGINS], end + 1)
    parts = (op[ops.M_OUTPUTS] + op[ops.M_CHUNK] - 1) // op[ops.M_CHUNK]
    block = task // parts
    while block >= _blocks_of(starts, wanted):
        block -= _blocks_of(starts, wanted)
        wanted += 1
    expert = words(op[ops.M_IDS_WANTED], end)[wanted]
    weights = words(op[ops.M_WEIGHTS] + 8 * ops.WEIGHTS * expert, ops.WEIGHTS)
    first = starts[wanted] + PANELS * block
    last = min(first + PANELS, starts[wanted + 1])
    place = begins[wanted] + ROWS * PANELS * block
    begin = task % parts * op[ops.M_CHUNK]
    size = 2 * ROWS * op[ops.M_LENGTH]
    set_shapes()
    for n in range(begin, min(begin + op[ops.M_CHUNK], op[ops.M_OUTPUTS]), WIDE):
        for panel in range(first, last, 2):
            x, panels = op[ops.M_X] + panel * size, min(last - panel, 2)
            ahead = 1 if panel == first else 0
            _sum_block(op, weights, ops.M_MATRIX, n, x, panels, ahead, scratch)
            if op[ops.M_GATE]:
                there = scratch + 2 * PANEL_SUM_BYTES
                _sum_block(op, weights, ops.M_GATE, n, x, panels, ahead, there)
            row = place + ROWS * (panel - first)
            _finish(op, scratch, panel, panels, row, begins[wanted + 1] - row, n)
    release()


def _multiply_nothing(op: Any, task: int, scratch: int) -> None:
    """Where there is no such unit: what would use it could not be compiled."""


multiply_panels = compiled(_multiply_panels if has_tiles() else _multiply_nothing)
