"""Attention of sweeps: 16 queries of a head at once, over all positions that they see.

Keys and values of a layer are laid out for the matrix unit first. Scores and weights stand by
positions, 16 queries each: all that is done with them is done to vectors of queries.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from engine.kernels import ops
from engine.kernels.attention import prepare_head
from engine.kernels.compiled import compiled, inlined
from engine.kernels.curves import constant, exponential
from engine.kernels.memory import floats, halves, store, stored, words
from engine.kernels.panels import ONE_PANEL, PANEL_SUM_BYTES, WIDE
from engine.kernels.processor import has_tiles
from engine.kernels.tiles import (
    DEPTH,
    OUTPUTS,
    ROWS,
    TILE_BYTES,
    pack,
    put_tile,
    release,
    rounded_pairs,
    set_shapes,
)
from engine.kernels.vectors import I32, VECTOR, Loop, at, load, number, spread

BLOCK = 32  # positions of a task that keeps
FARTHEST = 1 << 30  # a window that nothing is out of


@compiled
def keep(op: Any, reals: Any, task: int) -> None:
    """Lay out keys and values of a block of positions, keep them, and ready its queries."""
    block = words(op[ops.A_BLOCKS] + 16 * task, 2)
    sequence = words(op[ops.A_SEQUENCES] + 8 * ops.SEQUENCE * block[0], ops.SEQUENCE)
    past, width = sequence[ops.Q_PAST], op[ops.A_WIDTH]
    for position in range(block[1], block[1] + BLOCK):
        slot = sequence[ops.Q_SLOT] + position
        at_position = position * op[ops.A_POSITION_STRIDE] + op[ops.A_CONTEXT]
        if position < past:
            kept = sequence[ops.Q_PAST_AT] + at_position
            _lay_out(op, kept, kept + 2 * op[ops.A_KV_HEADS] * width, slot)
        elif position < past + sequence[ops.Q_LENGTH]:
            row = sequence[ops.Q_ROW] + position - past
            kept = sequence[ops.Q_CONTEXT] + at_position - past * op[ops.A_POSITION_STRIDE]
            _keep_row(op, reals, row, position, kept)
            _lay_out(op, kept, kept + 2 * op[ops.A_KV_HEADS] * width, slot)
        else:
            _lay_out_nothing(op, slot)


@compiled
def _keep_row(op: Any, reals: Any, row: int, position: int, kept: int) -> None:
    """Norm, turn and scale queries; norm, turn and keep keys; keep values."""
    heads, kv_heads, width = op[ops.A_HEADS], op[ops.A_KV_HEADS], op[ops.A_WIDTH]
    first = op[ops.A_QKV] + row * op[ops.A_QKV_STRIDE]
    for head in range(heads + kv_heads):
        norm = op[ops.A_QUERY_NORM] if head < heads else op[ops.A_KEY_NORM]
        prepare_head(op, reals, first + 4 * head * width, position, norm)
    queries = floats(first, heads * width)
    for i in range(heads * width):
        queries[i] *= np.float32(reals[ops.A_SCALE - ops.REALS])
    store(first + 4 * heads * width, 2 * kv_heads * width, kept, op[ops.KIND])


@compiled
def _lay_out(op: Any, keys: int, values: int, slot: int) -> None:
    """Put the key of a position into its slot, and its value across."""
    slots, width = op[ops.A_SLOTS], op[ops.A_WIDTH]
    for head in range(op[ops.A_KV_HEADS]):
        source = halves(keys + 2 * head * width, width)
        target = halves(op[ops.A_KEYS] + 2 * (head * slots + slot) * width, width)
        for i in range(width):
            target[i] = source[i]
        source = halves(values + 2 * head * width, width)
        across = halves(op[ops.A_VALUES] + 2 * (head * width * slots + slot), width * slots)
        for i in range(width):
            across[i * slots] = source[i]


@compiled
def _lay_out_nothing(op: Any, slot: int) -> None:
    """Let a slot behind the last position be harmless: its weight is nought, but NaN is not."""
    slots, width = op[ops.A_SLOTS], op[ops.A_WIDTH]
    for head in range(op[ops.A_KV_HEADS]):
        target = halves(op[ops.A_KEYS] + 2 * (head * slots + slot) * width, width)
        across = halves(op[ops.A_VALUES] + 2 * (head * width * slots + slot), width * slots)
        for i in range(width):
            target[i] = np.uint16(0)
            across[i * slots] = np.uint16(0)


@inlined
def _weigh(
    _context: Any,
    scores: Any,
    count: Any,
    begin: Any,
    first: Any,
    last: Any,
    window: Any,
    sink: Any,
    out: Any,
) -> tuple[Any, Any]:
    """Weights of `count` positions for 16 queries, packed in pairs of positions; and their sums.

    Positions are counted from `begin`; queries stand at `first`, `first` + 1 ... `last`, and see
    what is not behind them, nor a window or more before. `sink` is a score more, without a value.
    Scores are overwritten: at last the first 16 numbers are the sums.
    """

    def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
        scores, count, begin, first, last, window, sink, out = arguments
        whole = ir.VectorType(I32, ROWS)
        lowest = constant(float("-inf"))

        def spread_short(value: Any) -> Any:
            return spread(builder, builder.trunc(value, I32))

        lanes = ir.Constant(whole, list(range(ROWS)))
        place = builder.add(spread_short(first), lanes)
        end = spread_short(last)
        place = builder.select(builder.icmp_signed("<", place, end), place, end)
        before = builder.sub(place, spread_short(window))
        sinks = spread(builder, sink)

        loop = Loop(builder, number(0), [sinks])
        loop.begin(builder.sub(count, number(1)))
        offset = builder.mul(loop.index, number(4 * ROWS))
        position = spread_short(builder.add(begin, loop.index))
        is_seen = builder.and_(
            builder.icmp_signed("<=", position, place), builder.icmp_signed(">", position, before)
        )
        score = builder.select(is_seen, load(builder, "fp32", scores, offset), lowest)
        builder.store(score, at(builder, scores, offset, VECTOR)).align = 4
        best = loop.carried[0]
        better = builder.select(builder.fcmp_ordered(">", score, best), score, best)
        loop.close(1, [better])
        best = loop.carried[0]

        def weight(offset: Any) -> Any:
            score = load(builder, "fp32", scores, offset)
            made = exponential(builder, builder.fsub(score, best))
            return builder.select(builder.fcmp_ordered(">", score, lowest), made, constant(0.0))

        is_there = builder.fcmp_ordered(">", sinks, lowest)
        extra = exponential(builder, builder.fsub(sinks, best))
        extra = builder.select(is_there, extra, constant(0.0))
        loop = Loop(builder, number(0), [extra])
        loop.begin(builder.sub(count, number(1)))
        offset = builder.mul(loop.index, number(4 * ROWS))
        low = weight(offset)
        high = weight(builder.add(offset, number(4 * ROWS)))
        pairs = rounded_pairs(builder, low, high)
        half = builder.mul(loop.index, number(2 * ROWS))
        builder.store(pairs, at(builder, out, half, pairs.type)).align = 4
        loop.close(2, [builder.fadd(loop.carried[0], builder.fadd(low, high))])
        builder.store(loop.carried[0], at(builder, scores, number(0), VECTOR)).align = 4
        return context.get_dummy_value()

    return types.void(*[types.int64] * 6, types.float32, types.int64), generate


@compiled
def look_bytes(num_positions: int, width: int) -> int:
    """Scratch that 16 queries over so many positions need."""
    return 2 * ROWS * width + 6 * ROWS * num_positions + PANEL_SUM_BYTES


def _look(op: Any, task: int, scratch: int) -> None:
    """Attend with 16 queries of a head."""
    heads, width = op[ops.A_HEADS], op[ops.A_WIDTH]
    head = task % heads
    block = words(op[ops.A_BLOCKS] + 16 * (task // heads), 2)
    sequence = words(op[ops.A_SEQUENCES] + 8 * ops.SEQUENCE * block[0], ops.SEQUENCE)
    rows = min(ROWS, sequence[ops.Q_LENGTH] - block[1])
    first = sequence[ops.Q_PAST] + block[1]
    window = op[ops.A_WINDOW] if op[ops.A_WINDOW] else FARTHEST
    begin = max(0, first - window + 1) // DEPTH * DEPTH
    count = (first + rows + DEPTH - 1) // DEPTH * DEPTH - begin
    row = sequence[ops.Q_ROW] + block[1]
    shared = head // (heads // op[ops.A_KV_HEADS])
    slots, slot = op[ops.A_SLOTS], sequence[ops.Q_SLOT] + begin
    keys = op[ops.A_KEYS] + 2 * (shared * slots + slot) * width
    values = op[ops.A_VALUES] + 2 * (shared * width * slots + slot)
    scores = scratch + 2 * ROWS * width
    weights = scores + 4 * ROWS * count
    sums = weights + 2 * ROWS * count
    x = op[ops.A_QKV] + row * op[ops.A_QKV_STRIDE] + 4 * head * width
    pack(x, op[ops.A_QKV_STRIDE], rows, width, scratch)
    set_shapes()
    for n in range(0, count, WIDE):
        there = scores + 4 * ROWS * n
        ONE_PANEL(scratch, 0, keys + 2 * n * width, 2 * width, there, width // DEPTH, 1)
    sink = np.float32(-np.inf)
    if op[ops.A_SINKS]:
        sink = stored(op[ops.A_SINKS], op[ops.KIND], head)
    _weigh(scores, count, begin, first, first + rows - 1, window, sink, weights)
    out = op[ops.A_OUT] + row * op[ops.A_OUT_STRIDE] + 4 * head * width
    for n in range(0, width, WIDE):
        ONE_PANEL(weights, 0, values + 2 * n * slots, 2 * slots, sums, count // DEPTH, 0)
        _put_mixed(sums, scores, out + 4 * n, op[ops.A_OUT_STRIDE], rows)
    release()


@compiled
def _put_mixed(sums: int, totals: int, out: int, stride: int, rows: int) -> None:
    """Write 32 numbers of the heads of some rows: sums over what the weights sum to."""
    numbers, total = floats(sums, WIDE * ROWS), floats(totals, ROWS)
    for i in range(WIDE):
        for row in range(ROWS):
            numbers[i * ROWS + row] /= total[row]
    if rows == ROWS:
        put_tile(sums, out, stride)
        put_tile(sums + TILE_BYTES, out + 4 * OUTPUTS, stride)
        return
    for row in range(rows):
        target = floats(out + row * stride, WIDE)
        for i in range(WIDE):
            target[i] = numbers[i * ROWS + row]


def _look_nowhere(op: Any, task: int, scratch: int) -> None:
    """Where there is no such unit: what would use it could not be compiled."""


look = compiled(_look if has_tiles() else _look_nowhere)
