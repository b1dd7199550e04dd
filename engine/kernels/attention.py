"""Attention of one row's heads that share keys, over what its cache holds."""

import math
from typing import Any

import numpy as np

from engine.kernels import ops
from engine.kernels.compiled import compiled
from engine.kernels.curves import exponentials, largest
from engine.kernels.memory import floats, store, stored, words
from engine.kernels.norms import scale
from engine.kernels.products import multiply
from engine.kernels.vectors import WIDTH, make_mix

WIDE = 4  # vectors that are mixed at once
HALF_WIDE = make_mix("bf16", WIDE)
HALF_SMALL = make_mix("bf16", 1)
FULL_WIDE = make_mix("fp32", WIDE)
FULL_SMALL = make_mix("fp32", 1)


@compiled
def attend(op: Any, reals: Any, task: int, scratch: int) -> None:
    """Attend with the queries of one row that share a head of keys; `task` numbers those groups.

    `scratch` has room for the scores (queries, positions).
    """
    kv_heads, width = op[ops.A_KV_HEADS], op[ops.A_WIDTH]
    row, head = task // kv_heads, task % kv_heads
    group = op[ops.A_HEADS] // kv_heads
    heads = op[ops.A_QKV] + row * op[ops.A_QKV_STRIDE]
    queries = heads + 4 * head * group * width
    offset = row * op[ops.A_ROW_STRIDE] + head * op[ops.A_HEAD_STRIDE]
    keys, values = op[ops.A_KEYS] + offset, op[ops.A_VALUES] + offset
    position = words(op[ops.A_LENGTHS], row + 1)[row]
    end = position
    if not op[ops.A_IS_CROSS]:
        key = heads + 4 * (op[ops.A_HEADS] + head) * width
        place = position * op[ops.A_POSITION_STRIDE]
        prepare_head(op, reals, key, position, op[ops.A_KEY_NORM])
        store(key, width, keys + place, op[ops.KIND])
        store(key + 4 * kv_heads * width, width, values + place, op[ops.KIND])
        end += 1
    begin = max(0, end - op[ops.A_WINDOW]) if op[ops.A_WINDOW] else 0
    count = end - begin
    for i in range(group):
        query = queries + 4 * i * width
        prepare_head(op, reals, query, position, op[ops.A_QUERY_NORM])
        numbers = floats(query, width)
        for k in range(width):
            numbers[k] *= np.float32(reals[ops.A_SCALE - ops.REALS])
    stride = op[ops.A_POSITION_STRIDE]
    keys, values = keys + begin * stride, values + begin * stride
    kind, wide = op[ops.KIND], 4 * width
    multiply(kind, queries, wide, keys, stride, scratch, 4 * count, width, group, 0, count)
    for i in range(group):
        number = head * group + i
        out = op[ops.A_OUT] + row * op[ops.A_OUT_STRIDE] + number * wide
        _weigh(op, number, scratch + 4 * i * count, position - begin, count, values, out)


@compiled
def prepare_head(op: Any, reals: Any, head: int, position: int, norm: int) -> None:
    """Norm and turn a head, as far as the model does."""
    if norm:
        scale(head, op[ops.A_WIDTH], norm, op[ops.KIND], reals[ops.A_EPS - ops.REALS])
    half = op[ops.A_HALF]
    if half:
        numbers = floats(head, 2 * half)
        cosines = floats(op[ops.A_COS] + 4 * half * position, half)
        sines = floats(op[ops.A_SIN] + 4 * half * position, half)
        for i in range(half):
            first, second = numbers[i], numbers[i + half]
            numbers[i] = first * cosines[i] - second * sines[i]
            numbers[i + half] = second * cosines[i] + first * sines[i]


@compiled
def _weigh(op: Any, number: int, x: int, farthest: int, count: int, values: int, out: int) -> None:
    """Sum values by the softmax of a head's scores, the first of which is `farthest` away."""
    width, kind = op[ops.A_WIDTH], op[ops.KIND]
    if op[ops.A_RELATIVE]:
        relative = op[ops.A_RELATIVE] + number * op[ops.A_RELATIVE_STRIDE]
        scores, by_distance = floats(x, count), floats(relative, farthest + 1)
        for i in range(count):
            scores[i] += by_distance[farthest - i]
    sink = np.float32(-np.inf)
    if op[ops.A_SINKS]:
        sink = stored(op[ops.A_SINKS], kind, number)
    best = largest(x, count, sink)
    total = exponentials(x, count, best)
    if op[ops.A_SINKS]:
        total += np.float32(math.exp(sink - best))
    _mix(kind, x, values, op[ops.A_POSITION_STRIDE], out, count, width)
    numbers = floats(out, width)
    for k in range(width):
        numbers[k] /= total


@compiled
def _mix(kind: int, x: int, values: int, stride: int, out: int, count: int, width: int) -> None:
    """The sum of `count` rows of values, each times its number."""
    size = 2 if kind == ops.BF16 else 4
    done = 0
    while done + WIDE * WIDTH <= width:
        if kind == ops.BF16:
            HALF_WIDE(x, values + done * size, stride, out + 4 * done, count, WIDTH)
        else:
            FULL_WIDE(x, values + done * size, stride, out + 4 * done, count, WIDTH)
        done += WIDE * WIDTH
    while done < width:
        lanes = min(WIDTH, width - done)
        if kind == ops.BF16:
            HALF_SMALL(x, values + done * size, stride, out + 4 * done, count, lanes)
        else:
            FULL_SMALL(x, values + done * size, stride, out + 4 * done, count, lanes)
        done += WIDTH
