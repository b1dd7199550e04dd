"""Vector code for compiled functions: what LLVM is told itself, because no loop would become it.

Addresses are integers; strides are in bytes. A vector is 16 numbers of fp32, whatever is in memory.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from engine.kernels.compiled import inlined

WIDTH = 16
SIZES = {"bf16": 2, "fp32": 4}
UNROLLED = 2  # vectors of a row that are read at once: a line of bf16
AHEAD = 16  # rows of a matrix by which lines are asked for: 576 x 2 bytes from 8 to 14 GB/s
LINE_BYTES = 64
NUM_SUMS = 16  # of a tile: as many vectors, and as many are left for what is read

F32, I8, I16, I32, I64 = ir.FloatType(), *(ir.IntType(bits) for bits in (8, 16, 32, 64))
VECTOR = ir.VectorType(F32, WIDTH)
MASK = ir.VectorType(ir.IntType(1), WIDTH)
ZERO = ir.Constant(VECTOR, [0.0] * WIDTH)


def declare(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Type) -> Any:
    """A function that LLVM or the process offers."""
    found = builder.module.globals.get(name)
    return found or ir.Function(builder.module, ir.FunctionType(result, arguments), name)


def number(value: int) -> ir.Constant:
    """An integer constant."""
    return ir.Constant(I64, value)


def at(builder: ir.IRBuilder, address: Any, offset: Any, kind: ir.Type) -> Any:
    """The pointer to a place."""
    return builder.inttoptr(builder.add(address, offset), kind.as_pointer())


def widened(builder: ir.IRBuilder, halves: Any) -> Any:
    """bf16 as the fp32 that begins with the same bits."""
    wide = ir.VectorType(I32, WIDTH)
    shifted = builder.shl(builder.zext(halves, wide), ir.Constant(wide, [16] * WIDTH))
    return builder.bitcast(shifted, VECTOR)


def load(builder: ir.IRBuilder, kind: str, address: Any, offset: Any, mask: Any = None) -> Any:
    """A vector from memory; where the mask is not set, noughts, and nothing is read."""
    stored = VECTOR if kind == "fp32" else ir.VectorType(I16, WIDTH)
    pointer = at(builder, address, offset, stored)
    if mask is None:
        value = builder.load(pointer)
        value.align = SIZES[kind]
    else:
        name = f"llvm.masked.load.v16{'f32' if kind == 'fp32' else 'i16'}.p0"
        function = declare(builder, name, stored, pointer.type, I32, MASK, stored)
        nothing = ir.Constant(stored, [0] * WIDTH if kind == "bf16" else [0.0] * WIDTH)
        align = ir.Constant(I32, SIZES[kind])
        value = builder.call(function, [pointer, align, mask, nothing])
    return value if kind == "fp32" else widened(builder, value)


def multiply_add(builder: ir.IRBuilder, a: Any, b: Any, c: Any) -> Any:
    """A * b + c."""
    function = declare(builder, "llvm.fma.v16f32", VECTOR, VECTOR, VECTOR, VECTOR)
    return builder.call(function, [a, b, c])


def first_lanes(builder: ir.IRBuilder, count: Any) -> Any:
    """The mask of the first lanes."""
    lanes = ir.VectorType(I64, WIDTH)
    return builder.icmp_signed("<", ir.Constant(lanes, list(range(WIDTH))), spread(builder, count))


def spread(builder: ir.IRBuilder, value: Any) -> Any:
    """A vector of one value."""
    kind = ir.VectorType(value.type, WIDTH)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
    nowhere = ir.Constant(kind, ir.Undefined)
    return builder.shuffle_vector(one, nowhere, ir.Constant(ir.VectorType(I32, WIDTH), [0] * WIDTH))


def sum_lanes(builder: ir.IRBuilder, vectors: list[Any]) -> Any:
    """The sums of up to 16 vectors, in the first lanes of one.

    Each vector's lanes are added in the same order, however many vectors there are.
    """
    half = WIDTH // 2
    while half:
        lower = [lane for lane in range(2 * WIDTH) if lane % (2 * half) < half]
        masks = [
            ir.Constant(ir.VectorType(I32, WIDTH), [lane + shift for lane in lower])
            for shift in (0, half)
        ]
        pairs = [
            (vectors[i], vectors[min(i + 1, len(vectors) - 1)]) for i in range(0, len(vectors), 2)
        ]
        vectors = [
            builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks)) for a, b in pairs
        ]
        half //= 2
    return vectors[0]


class Loop:
    """A loop of a builder over an integer, with vectors that it carries along."""

    def __init__(self, builder: ir.IRBuilder, begin: Any, carried: list[Any]) -> None:
        before = builder.block
        self._builder = builder
        self._head = builder.append_basic_block("head")
        self._body = builder.append_basic_block("body")
        self._end = builder.append_basic_block("end")
        builder.branch(self._head)
        builder.position_at_end(self._head)
        self.index = builder.phi(begin.type)
        self.index.add_incoming(begin, before)
        self.carried = []
        for value in carried:
            phi = builder.phi(value.type)
            phi.add_incoming(value, before)
            self.carried.append(phi)

    def begin(self, limit: Any) -> None:
        """Go on in the body while the index is at most `limit`."""
        go_on = self._builder.icmp_signed("<=", self.index, limit)
        self._builder.cbranch(go_on, self._body, self._end)
        self._builder.position_at_end(self._body)

    def close(self, step: int, values: list[Any]) -> None:
        """End the body; go on behind the loop, where `carried` has the last values."""
        following = self._builder.add(self.index, number(step))
        self.index.add_incoming(following, self._builder.block)
        for phi, value in zip(self.carried, values, strict=True):
            phi.add_incoming(value, self._builder.block)
        self._builder.branch(self._head)
        self._builder.position_at_end(self._end)


def make_tile(kind: str, num_outputs: int, num_rows: int) -> Callable[..., None]:
    """Products of rows of x with rows of a matrix: one sum per pair, each in the same order.

    Arguments: x, its stride, matrix, its stride, out, its stride, length of a row. `out` gets
    `num_rows` rows of `num_outputs` numbers of fp32. What is a few rows ahead is asked for.
    """

    @inlined
    def tile(
        _context: Any, x: Any, xs: Any, w: Any, ws: Any, out: Any, os: Any, length: Any
    ) -> tuple[Any, Any]:
        def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
            x, xs, w, ws, out, os, length = arguments
            matrix = [builder.add(w, builder.mul(ws, number(n))) for n in range(num_outputs)]
            rows = [builder.add(x, builder.mul(xs, number(r))) for r in range(num_rows)]

            def add(sums: list[Any], index: Any, mask: Any = None) -> list[Any]:
                w_at = builder.mul(index, number(SIZES[kind]))
                x_at = builder.mul(index, number(4))
                left = [load(builder, kind, place, w_at, mask) for place in matrix]
                made = list(sums)
                for r, row in enumerate(rows):
                    right = load(builder, "fp32", row, x_at, mask)
                    for n, weights in enumerate(left):
                        place = r * num_outputs + n
                        made[place] = multiply_add(builder, weights, right, sums[place])
                return made

            ahead = builder.mul(ws, number(AHEAD))
            loop = Loop(builder, number(0), [ZERO] * (num_outputs * num_rows))
            loop.begin(builder.sub(length, number(UNROLLED * WIDTH)))
            sums = list(loop.carried)
            for place in matrix:
                w_at = builder.mul(loop.index, number(SIZES[kind]))
                ask_ahead(builder, builder.add(place, ahead), w_at)
            for i in range(UNROLLED):
                sums = add(sums, builder.add(loop.index, number(WIDTH * i)))
            loop.close(UNROLLED * WIDTH, sums)
            begin, sums = loop.index, list(loop.carried)
            loop = Loop(builder, begin, sums)
            loop.begin(builder.sub(length, number(WIDTH)))
            loop.close(WIDTH, add(loop.carried, loop.index))
            rest = builder.sub(length, loop.index)
            tail = Loop(builder, number(0), list(loop.carried))
            tail.begin(builder.sub(rest, number(1)))
            tail.close(WIDTH, add(tail.carried, loop.index, first_lanes(builder, rest)))
            sums = sum_lanes(builder, list(tail.carried))
            some = ir.VectorType(F32, num_outputs)
            for r in range(num_rows):
                lanes = [r * num_outputs + n for n in range(num_outputs)]
                picked = builder.shuffle_vector(
                    sums, ZERO, ir.Constant(ir.VectorType(I32, num_outputs), lanes)
                )
                stored = builder.store(picked, at(builder, out, builder.mul(os, number(r)), some))
                stored.align = 4
            return _.get_dummy_value()

        return types.void(*[types.int64] * 7), generate

    return tile


def ask_ahead(builder: ir.IRBuilder, address: Any, offset: Any) -> None:
    """Have a line of memory brought into the cache."""
    pointer = at(builder, address, offset, I8)
    function = declare(builder, "llvm.prefetch.p0", ir.VoidType(), pointer.type, I32, I32, I32)
    builder.call(function, [pointer, *(ir.Constant(I32, value) for value in (0, 2, 1))])


def make_mix(kind: str, num_vectors: int) -> Callable[..., None]:
    """The sum of rows of a matrix, each times a number.

    Arguments: numbers, matrix, its stride, out, number of rows, lanes that count. `out` gets
    `num_vectors` vectors; of a single one only its first lanes.
    """

    @inlined
    def mix(
        _context: Any, numbers: Any, w: Any, ws: Any, out: Any, count: Any, lanes: Any
    ) -> tuple[Any, Any]:
        def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
            numbers, w, ws, out, count, lanes = arguments
            mask = None if num_vectors > 1 else first_lanes(builder, lanes)
            loop = Loop(builder, number(0), [ZERO] * num_vectors)
            loop.begin(builder.sub(count, number(1)))
            place = at(builder, numbers, builder.mul(loop.index, number(4)), F32)
            factor = spread(builder, builder.load(place))
            row = builder.mul(loop.index, ws)
            ahead = builder.add(row, builder.mul(ws, number(AHEAD)))
            for place in range(0, num_vectors * WIDTH * SIZES[kind], LINE_BYTES):
                ask_ahead(builder, w, builder.add(ahead, number(place)))
            made = []
            for i, total in enumerate(loop.carried):
                offset = builder.add(row, number(i * WIDTH * SIZES[kind]))
                value = load(builder, kind, w, offset, mask)
                made.append(multiply_add(builder, factor, value, total))
            loop.close(1, made)
            for i, total in enumerate(loop.carried):
                place = at(builder, out, number(i * WIDTH * 4), VECTOR)
                if mask is None:
                    builder.store(total, place).align = 4
                    continue
                name = "llvm.masked.store.v16f32.p0"
                function = declare(builder, name, ir.VoidType(), VECTOR, place.type, I32, MASK)
                builder.call(function, [total, place, ir.Constant(I32, 4), mask])
            return _.get_dummy_value()

        return types.void(*[types.int64] * 6), generate

    return mix
