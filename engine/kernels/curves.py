"""Exponentials and activations over vectors, for compiled functions."""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types

from engine.kernels.compiled import compiled, inlined
from engine.kernels.vectors import (
    F32,
    I32,
    MASK,
    VECTOR,
    WIDTH,
    Loop,
    at,
    declare,
    first_lanes,
    load,
    multiply_add,
    number,
    sum_lanes,
)

LOWEST, HIGHEST = -87.3, 88.3  # beyond which exp leaves fp32's normal numbers
LOG2_E = 1.44269504088896341
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
ERF = (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)
ERF_SLOPE = 0.3275911
GELU_SLOPE, GELU_CUBE = 1.5957691216057308, 0.044715  # 2 * sqrt(2 / pi)
CLAMP, CLAMPED_SLOPE = 7.0, 1.702  # of gpt-oss' feed-forward

Value = Any


def constant(value: float) -> ir.Constant:
    """A vector of one number."""
    return ir.Constant(VECTOR, [value] * WIDTH)


def clamp(builder: ir.IRBuilder, x: Value, low: float | None, high: float | None) -> Value:
    """Within bounds; NaN stays."""
    for bound, sign in ((low, "<"), (high, ">")):
        if bound is not None:
            is_beyond = builder.fcmp_ordered(sign, x, constant(bound))
            x = builder.select(is_beyond, constant(bound), x)
    return x


def exponential(builder: ir.IRBuilder, x: Value) -> Value:
    """E to the power of x, within 2 units of the last place. Source: Cephes, expf."""
    x = clamp(builder, x, LOWEST, HIGHEST)
    turns = multiply_add(builder, x, constant(LOG2_E), constant(0.5))
    floor = builder.call(declare(builder, "llvm.floor.v16f32", VECTOR, VECTOR), [turns])
    rest = multiply_add(builder, floor, constant(-LN2_HIGH), x)
    rest = multiply_add(builder, floor, constant(-LN2_LOW), rest)
    power = constant(EXP[0])
    for factor in EXP[1:]:
        power = multiply_add(builder, power, rest, constant(factor))
    power = multiply_add(builder, builder.fmul(power, rest), rest, rest)
    power = builder.fadd(power, constant(1.0))
    whole = ir.VectorType(I32, WIDTH)
    exponent = builder.add(builder.fptosi(floor, whole), ir.Constant(whole, [127] * WIDTH))
    scale = builder.bitcast(builder.shl(exponent, ir.Constant(whole, [23] * WIDTH)), VECTOR)
    return builder.fmul(power, scale)


def sigmoid(builder: ir.IRBuilder, x: Value) -> Value:
    """1 / (1 + exp(-x))."""
    below = builder.fadd(exponential(builder, builder.fneg(x)), constant(1.0))
    return builder.fdiv(constant(1.0), below)


def relu(builder: ir.IRBuilder, x: Value) -> Value:
    """The positive part."""
    return clamp(builder, x, 0.0, None)


def silu(builder: ir.IRBuilder, x: Value) -> Value:
    """X * sigmoid(x)."""
    return builder.fmul(x, sigmoid(builder, x))


def gelu_tanh(builder: ir.IRBuilder, x: Value) -> Value:
    """The tanh form of GELU: 0.5 * (1 + tanh(u)) is sigmoid(2 u)."""
    square = builder.fmul(x, x)
    inner = multiply_add(builder, square, constant(GELU_CUBE), constant(1.0))
    inner = builder.fmul(builder.fmul(inner, x), constant(GELU_SLOPE))
    return builder.fmul(x, sigmoid(builder, inner))


def gelu(builder: ir.IRBuilder, x: Value) -> Value:
    """X * Phi(x), within 2e-7 of |x|. Source: Abramowitz and Stegun 7.1.26."""
    z = builder.fmul(x, constant(0.7071067811865476))
    size = builder.select(builder.fcmp_ordered("<", z, constant(0.0)), builder.fneg(z), z)
    below = multiply_add(builder, size, constant(ERF_SLOPE), constant(1.0))
    t = builder.fdiv(constant(1.0), below)
    power = constant(ERF[0])
    for factor in ERF[1:]:
        power = multiply_add(builder, power, t, constant(factor))
    tail = builder.fmul(power, t)
    tail = builder.fmul(tail, exponential(builder, builder.fneg(builder.fmul(z, z))))
    half = builder.fmul(tail, constant(0.5))  # what lies beyond |x|
    upper = builder.fsub(constant(1.0), half)
    share = builder.select(builder.fcmp_ordered("<", z, constant(0.0)), half, upper)
    return builder.fmul(x, share)


def clamped_swiglu(builder: ir.IRBuilder, x: Value) -> Value:
    """gpt-oss' activation: bounded from above, its sigmoid steeper."""
    x = clamp(builder, x, None, CLAMP)
    return builder.fmul(x, sigmoid(builder, builder.fmul(x, constant(CLAMPED_SLOPE))))


def clamped_gate(builder: ir.IRBuilder, x: Value) -> Value:
    """The gate that goes with it."""
    return builder.fadd(clamp(builder, x, -CLAMP, CLAMP), constant(1.0))


Curve = Callable[[ir.IRBuilder, Value], Value]
CURVES: dict[str, Curve] = {
    "relu": relu,
    "silu": silu,
    "gelu_tanh": gelu_tanh,
    "gelu": gelu,
    "clamped_swiglu": clamped_swiglu,
}


def each(builder: ir.IRBuilder, count: Value, work: Callable[..., None]) -> None:
    """Do a work on all vectors of `count` numbers: on whole ones, then on the rest with a mask."""
    loop = Loop(builder, number(0), [])
    loop.begin(builder.sub(count, number(WIDTH)))
    work(loop.index, None)
    loop.close(WIDTH, [])
    rest = builder.sub(count, loop.index)
    tail = Loop(builder, number(0), [])
    tail.begin(builder.sub(rest, number(1)))
    work(loop.index, first_lanes(builder, rest))
    tail.close(WIDTH, [])


def put(builder: ir.IRBuilder, address: Value, offset: Value, value: Value, mask: Value) -> None:
    """Store a vector, or what of it the mask allows."""
    place = at(builder, address, offset, VECTOR)
    if mask is None:
        builder.store(value, place).align = 4
        return
    name = "llvm.masked.store.v16f32.p0"
    function = declare(builder, name, ir.VoidType(), VECTOR, place.type, I32, MASK)
    builder.call(function, [value, place, ir.Constant(I32, 4), mask])


def make_activation(name: str) -> Callable[..., None]:
    """Activate `count` numbers at an address; times those at `gate`, unless that is 0."""
    curve = CURVES[name]

    @inlined
    def activate(_context: Any, x: Any, gate: Any, count: Any) -> tuple[Any, Any]:
        def generate(context: Any, builder: ir.IRBuilder, _: Any, arguments: Any) -> Any:
            x, gate, count = arguments

            def alone(index: Value, mask: Value) -> None:
                offset = builder.mul(index, number(4))
                made = curve(builder, load(builder, "fp32", x, offset, mask))
                put(builder, x, offset, made, mask)

            def gated(index: Value, mask: Value) -> None:
                offset = builder.mul(index, number(4))
                made = curve(builder, load(builder, "fp32", x, offset, mask))
                other = load(builder, "fp32", gate, offset, mask)
                if name == "clamped_swiglu":
                    other = clamped_gate(builder, other)
                put(builder, x, offset, builder.fmul(made, other), mask)

            is_gated = builder.icmp_signed("!=", gate, number(0))
            with builder.if_else(is_gated) as (then, otherwise):
                with then:
                    each(builder, count, gated)
                with otherwise:
                    each(builder, count, alone)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 3), generate

    return activate


@inlined
def largest(_context: Any, x: Any, count: Any, least: Any) -> tuple[Any, Any]:
    """The largest of `count` numbers at an address, and of `least`."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        x, count, least = arguments
        lowest = constant(float("-inf"))

        def better(best: Value, index: Value, mask: Value) -> Value:
            value = load(builder, "fp32", x, builder.mul(index, number(4)), mask)
            if mask is not None:
                value = builder.select(mask, value, lowest)
            return builder.select(builder.fcmp_ordered(">", value, best), value, best)

        loop = Loop(builder, number(0), [lowest])
        loop.begin(builder.sub(count, number(WIDTH)))
        loop.close(WIDTH, [better(loop.carried[0], loop.index, None)])
        rest = builder.sub(count, loop.index)
        tail = Loop(builder, number(0), list(loop.carried))
        tail.begin(builder.sub(rest, number(1)))
        tail.close(WIDTH, [better(tail.carried[0], loop.index, first_lanes(builder, rest))])
        reduce = declare(builder, "llvm.vector.reduce.fmax.v16f32", F32, VECTOR)
        best = builder.call(reduce, [tail.carried[0]])
        return builder.select(builder.fcmp_ordered(">", best, least), best, least)

    return types.float32(types.int64, types.int64, types.float32), generate


@inlined
def exponentials(_context: Any, x: Any, count: Any, shift: Any) -> tuple[Any, Any]:
    """Put exp(x - shift) in place of `count` numbers at an address; returns their sum."""

    def generate(_: Any, builder: ir.IRBuilder, __: Any, arguments: Any) -> Any:
        x, count, shift = arguments
        nowhere = ir.Constant(VECTOR, ir.Undefined)
        one = builder.insert_element(nowhere, shift, ir.Constant(I32, 0))
        first = ir.Constant(ir.VectorType(I32, WIDTH), [0] * WIDTH)
        shift = builder.shuffle_vector(one, nowhere, first)

        def go_on(total: Value, index: Value, mask: Value) -> Value:
            offset = builder.mul(index, number(4))
            made = exponential(builder, builder.fsub(load(builder, "fp32", x, offset, mask), shift))
            if mask is not None:
                made = builder.select(mask, made, constant(0.0))
            put(builder, x, offset, made, mask)
            return builder.fadd(total, made)

        loop = Loop(builder, number(0), [constant(0.0)])
        loop.begin(builder.sub(count, number(WIDTH)))
        loop.close(WIDTH, [go_on(loop.carried[0], loop.index, None)])
        rest = builder.sub(count, loop.index)
        tail = Loop(builder, number(0), list(loop.carried))
        tail.begin(builder.sub(rest, number(1)))
        tail.close(WIDTH, [go_on(tail.carried[0], loop.index, first_lanes(builder, rest))])
        total = sum_lanes(builder, [tail.carried[0]])
        return builder.extract_element(total, ir.Constant(I32, 0))

    return types.float32(types.int64, types.int64, types.float32), generate


ACTIVATIONS = tuple(CURVES)
RELU, SILU, GELU_TANH, GELU, CLAMPED_SWIGLU = map(make_activation, ACTIVATIONS)


@compiled
def activate(number: int, x: int, gate: int, count: int) -> None:
    """Apply the activation of a number, from 1, in place; times the gate, unless that is 0."""
    if number == 1:
        RELU(x, gate, count)
    elif number == 2:
        SILU(x, gate, count)
    elif number == 3:
        GELU_TANH(x, gate, count)
    elif number == 4:
        GELU(x, gate, count)
    else:
        CLAMPED_SWIGLU(x, gate, count)
