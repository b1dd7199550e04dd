"""Mixtures of experts: routes of rows, pairs of rows and experts in order, and their products."""

import math
from typing import Any

import numpy as np

from engine.kernels import ops
from engine.kernels.compiled import compiled
from engine.kernels.curves import activate
from engine.kernels.memory import add_stored, floats, words
from engine.kernels.norms import normalize
from engine.kernels.products import multiply
from engine.kernels.tiles import ROWS, multiply_in_tiles, pack


@compiled
def route(op: Any, reals: Any, row: int, scratch: int) -> None:
    """Norm a row, and choose its experts and their gates."""
    length, num_experts, kind = op[ops.R_LENGTH], op[ops.R_EXPERTS], op[ops.KIND]
    x = op[ops.R_X] + row * op[ops.R_X_STRIDE]
    normed = op[ops.R_NORMED] + 4 * row * length
    if op[ops.R_NORM]:
        weight, bias = op[ops.R_NORM_WEIGHT], op[ops.R_NORM_BIAS]
        eps = reals[ops.R_EPS - ops.REALS]
        normalize(x, normed, length, op[ops.R_NORM], weight, bias, kind, eps)
    else:
        source, target = floats(x, length), floats(normed, length)
        for i in range(length):
            target[i] = source[i]
    router, stride = op[ops.R_ROUTER], length * (2 if kind == ops.BF16 else 4)
    multiply(kind, normed, 0, router, stride, scratch, 0, length, 1, 0, num_experts)
    if op[ops.R_BIAS]:
        add_stored(scratch, num_experts, op[ops.R_BIAS], kind)
    _gate(op, floats(scratch, num_experts))
    _choose(op, reals, row, floats(scratch, num_experts))
    if op[ops.R_SHARED_GATE]:
        multiply(kind, normed, 0, op[ops.R_SHARED_GATE], 0, scratch, 0, length, 1, 0, 1)
        floats(op[ops.R_SHARED], row + 1)[row] = _sigmoid(floats(scratch, 1)[0])


@compiled
def _sigmoid(value: float) -> Any:
    return np.float32(1 / (1 + math.exp(-value)))


@compiled
def _gate(op: Any, scores: Any) -> None:
    """Make gates of the scores of all experts, as far as the router does."""
    how = op[ops.R_HOW]
    if how == ops.SIGMOID:
        for i in range(len(scores)):
            scores[i] = _sigmoid(scores[i])
    elif how == ops.SOFTMAX:
        best, total = scores[0], np.float32(0)
        for score in scores:
            best = max(best, score)
        for i in range(len(scores)):
            scores[i] = np.float32(math.exp(scores[i] - best))
            total += scores[i]
        for i in range(len(scores)):
            scores[i] /= total


@compiled
def _best_left(gates: Any, taken: Any, bias: int) -> Any:
    """The best expert that is not taken, the first of equals; some one, whatever the gates are."""
    best, best_value = -1, np.float32(0)
    for expert in range(len(gates)):
        value = gates[expert]
        if bias:
            value += floats(bias, expert + 1)[expert]
        if best < 0 or value > best_value:
            is_taken = False
            for other in taken:
                is_taken |= other == expert
            if not is_taken:
                best, best_value = expert, value
    return best


@compiled
def _choose(op: Any, reals: Any, row: int, gates: Any) -> None:
    """Write the best experts of a row by rising number, and their gates."""
    size, bias = op[ops.R_PER_ROW], op[ops.R_CHOICE_BIAS]
    ids = words(op[ops.R_IDS] + 8 * row * size, size)
    own = floats(op[ops.R_GATES] + 4 * row * size, size)
    for chosen in range(size):
        best = _best_left(gates, ids[:chosen], bias)
        place = chosen
        while place > 0 and ids[place - 1] > best:
            ids[place] = ids[place - 1]
            place -= 1
        ids[place] = best
    total = np.float32(0)
    for i in range(size):
        own[i] = gates[ids[i]]
        total += own[i]
    how, factor = op[ops.R_HOW], np.float32(reals[ops.R_SCALE - ops.REALS])
    if how == ops.SIGMOID_FIRST:
        own[0] = _sigmoid(own[0])
    elif how != ops.FIRST:
        if op[ops.R_NORMALIZES]:
            factor /= total if how == ops.SOFTMAX else total + np.float32(1e-20)
        for i in range(size):
            own[i] *= factor


@compiled
def group(op: Any, num_rows: int) -> None:
    """Put the pairs of rows and experts in the order of experts."""
    num_experts, num_pairs = op[ops.G_EXPERTS], num_rows * op[ops.G_PER_ROW]
    ids, order = words(op[ops.G_IDS], num_pairs), words(op[ops.G_ORDER], num_pairs)
    places = words(op[ops.G_PLACES], num_pairs)
    wanted = words(op[ops.G_IDS_WANTED], num_experts)
    begins = words(op[ops.G_BEGINS], num_experts + 1)
    starts = words(op[ops.G_STARTS], num_experts + 1)
    counts = words(op[ops.G_COUNTS], num_experts)
    for expert in range(num_experts):
        counts[expert] = 0
    for pair in range(num_pairs):
        counts[ids[pair]] += 1
    found, place, start = 0, 0, 0
    for expert in range(num_experts):
        count = counts[expert]
        counts[expert] = place  # from here on where its next pair goes
        if count:
            wanted[found], begins[found], starts[found] = expert, place, start
            found, place, start = found + 1, place + count, start + (count + ROWS - 1) // ROWS
    begins[found], starts[found] = place, start
    for pair in range(num_pairs):
        place = counts[ids[pair]]
        order[place], places[pair] = pair, place
        counts[ids[pair]] = place + 1
    words(op[ops.G_WANTED], 1)[0] = found


@compiled
def last_wanted(op: Any) -> Any:
    """Behind the last expert of an operation."""
    return op[ops.M_END] if op[ops.M_END] else words(op[ops.M_WANTED], 1)[0]


@compiled
def gather_tasks(op: Any) -> Any:
    """The number of pairs of the experts of an operation."""
    end = last_wanted(op)
    begins = words(op[ops.M_BEGINS], end + 1)
    return begins[end] - begins[op[ops.M_BEGIN]]


@compiled
def gather(op: Any, reals: Any, task: int) -> None:
    """Copy the row of a pair to its place, normed as the expert does."""
    end, begin = last_wanted(op), op[ops.M_BEGIN]
    begins = words(op[ops.M_BEGINS], end + 1)
    place = begins[begin] + task
    wanted = begin
    while begins[wanted + 1] <= place:
        wanted += 1
    expert = words(op[ops.M_IDS_WANTED], end)[wanted]
    row = words(op[ops.M_ORDER], place + 1)[place] // op[ops.M_PER_ROW]
    length = op[ops.M_LENGTH]
    x, out = op[ops.M_X] + row * op[ops.M_X_STRIDE], op[ops.M_OUT] + 4 * place * length
    weights = op[ops.M_WEIGHTS] + 8 * ops.WEIGHTS * expert
    norm = words(weights, ops.WEIGHTS)[ops.NORM_WEIGHT]
    if norm:
        normalize(x, out, length, 1, norm, 0, op[ops.KIND], reals[ops.M_EPS - ops.REALS])
    else:
        source, target = floats(x, length), floats(out, length)
        for i in range(length):
            target[i] = source[i]


@compiled
def expert_tasks(op: Any) -> Any:
    """The number of parts of outputs of the experts of an operation."""
    parts = (op[ops.M_OUTPUTS] + op[ops.M_CHUNK] - 1) // op[ops.M_CHUNK]
    return (last_wanted(op) - op[ops.M_BEGIN]) * parts


@compiled
def _outputs(  # noqa: PLR0913  which outputs of what, and rows that may be packed
    op: Any,
    weights: Any,
    which: int,
    wanted: int,
    begin: int,
    end: int,
    out: int,
    packed: int,
    tiles: int,
) -> None:
    """Some outputs of one matrix of an expert, and its bias, for all its pairs."""
    begins = words(op[ops.M_BEGINS], wanted + 2)
    first, last = begins[wanted], begins[wanted + 1]
    kind, length, outputs = op[ops.KIND], op[ops.M_LENGTH], op[ops.M_OUTPUTS]
    size = 2 if kind == ops.BF16 else 4
    matrix, bias = weights[op[which]], weights[op[which + 1]]
    x, out = op[ops.M_X] + 4 * first * length, out + 4 * first * outputs
    stride, wide, rows = length * size, 4 * outputs, last - first
    done = begin
    if packed:
        done = multiply_in_tiles(packed, matrix, stride, out, wide, length, rows, begin, end, tiles)
    multiply(kind, x, 4 * length, matrix, stride, out, wide, length, rows, done, end)
    if bias:
        for row in range(rows):
            add_stored(out + row * wide + 4 * begin, end - begin, bias + size * begin, kind)


@compiled
def run_expert(op: Any, task: int, scratch: int) -> None:
    """Some outputs of an expert for all its pairs: act(x * matrix) [* (x * gate)].

    `scratch` has room for packed rows and sums, if it is one for tiles.
    """
    outputs, length = op[ops.M_OUTPUTS], op[ops.M_LENGTH]
    parts = (outputs + op[ops.M_CHUNK] - 1) // op[ops.M_CHUNK]
    wanted = op[ops.M_BEGIN] + task // parts
    begin = task % parts * op[ops.M_CHUNK]
    end = min(begin + op[ops.M_CHUNK], outputs)
    expert = words(op[ops.M_IDS_WANTED], wanted + 1)[wanted]
    weights = words(op[ops.M_WEIGHTS] + 8 * ops.WEIGHTS * expert, ops.WEIGHTS)
    begins = words(op[ops.M_BEGINS], wanted + 2)
    first, rows = begins[wanted], begins[wanted + 1] - begins[wanted]
    packed, tiles = 0, scratch + 2 * length * ((rows + ROWS - 1) // ROWS * ROWS)
    if op[ops.M_TILES] and rows >= op[ops.M_TILES]:
        packed = scratch
        pack(op[ops.M_X] + 4 * first * length, 4 * length, rows, length, packed)
    _outputs(op, weights, ops.M_MATRIX, wanted, begin, end, op[ops.M_OUT], packed, tiles)
    if op[ops.M_GATE]:
        _outputs(op, weights, ops.M_GATE, wanted, begin, end, op[ops.M_GATE_OUT], packed, tiles)
    if op[ops.M_ACTIVATION]:
        for pair in range(first, first + rows):
            there = 4 * (pair * outputs + begin)
            gate = op[ops.M_GATE_OUT] + there if op[ops.M_GATE] else 0
            activate(op[ops.M_ACTIVATION], op[ops.M_OUT] + there, gate, end - begin)


@compiled
def combine(op: Any, row: int) -> None:
    """Add what its experts made of a row, by rising number, and the shared one."""
    length, size = op[ops.C_LENGTH], op[ops.C_PER_ROW]
    x = floats(op[ops.C_X] + row * op[ops.C_X_STRIDE], length)
    places = words(op[ops.C_PLACES], (row + 1) * size)
    for i in range(row * size, (row + 1) * size):
        made = floats(op[ops.C_OUTS] + 4 * places[i] * length, length)
        gate = floats(op[ops.C_GATES], i + 1)[i] if op[ops.C_GATES] else np.float32(1)
        for k in range(length):
            x[k] += gate * made[k]
    if op[ops.C_SHARED]:
        made = floats(op[ops.C_SHARED] + 4 * row * length, length)
        gate = np.float32(1)
        if op[ops.C_SHARED_GATES]:
            gate = floats(op[ops.C_SHARED_GATES], row + 1)[row]
        for k in range(length):
            x[k] += gate * made[k]
