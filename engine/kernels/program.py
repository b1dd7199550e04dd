"""Programs of operations, which threads run together; between operations they wait for each other.

Which thread does a task changes no result.
"""

from typing import Any

import numpy as np

from engine.kernels import ops
from engine.kernels.attention import attend
from engine.kernels.compiled import compiled, merged
from engine.kernels.curves import activate
from engine.kernels.memory import (
    add_shared,
    add_stored,
    doubles,
    floats,
    get_shared,
    post_semaphore,
    swap_shared,
    wait_semaphore,
    words,
    yield_core,
)
from engine.kernels.mixture import (
    combine,
    expert_tasks,
    gather,
    gather_tasks,
    group,
    route,
    run_expert,
)
from engine.kernels.norms import normalize, scale
from engine.kernels.panels import multiply_panels, pack_panel, panel_product_tasks, panel_tasks
from engine.kernels.products import multiply
from engine.kernels.sweep_attention import keep, look
from engine.kernels.tiles import ROWS, SUM_BYTES, multiply_in_tiles, pack

# Words that threads share, each in a line of memory of its own.
LINE = 8
EPOCH, ARRIVED, IS_OVER, THREADS, TABLE, NUM_OPS, COUNTERS, NUM_ROWS, SCRATCH, SCRATCH_BYTES = (
    range(0, 10 * LINE, LINE)
)
ASLEEP = 10 * LINE  # of each thread, from here
LOOKS = 100_000  # for a program before a thread sleeps, some 0.1 ms
PATIENCE = 4_000  # looks for the others before a thread lets go of its core
SEMAPHORE_BYTES = 64


@compiled
def _multiply_out(  # noqa: PLR0913  rows and outputs of a product, and room
    op: Any,
    matrix: int,
    bias: int,
    out: int,
    x: int,
    xs: int,
    num_rows: int,
    begin: int,
    end: int,
    packed: int,
    tiles: int,
) -> None:
    """Write some outputs of a product, with its bias; of packed rows, if there are any."""
    kind, os = op[ops.KIND], op[ops.P_OUT_STRIDE]
    stride, length = op[ops.P_STRIDE], op[ops.P_LENGTH]
    first = begin
    if packed:
        first = multiply_in_tiles(
            packed, matrix, stride, out, os, length, num_rows, begin, end, tiles
        )
    multiply(kind, x, xs, matrix, stride, out, os, length, num_rows, first, end)
    if bias:
        size = 2 if kind == ops.BF16 else 4
        for row in range(num_rows):
            add_stored(out + row * os + 4 * begin, end - begin, bias + size * begin, kind)


@merged
def _do_product(
    op: Any, task: int, x: int, xs: int, packed: int, num_rows: int, tiles: int, scratch: int
) -> None:
    """The outputs of one task."""
    begin = task * op[ops.P_CHUNK]
    end = min(begin + op[ops.P_CHUNK], op[ops.P_OUTPUTS])
    target, os, gate, other = (
        op[ops.P_OUT],
        op[ops.P_OUT_STRIDE],
        op[ops.P_GATE],
        op[ops.P_GATE_OUT],
    )
    out = scratch - 4 * begin if op[ops.P_ADDS] else target  # with the same stride
    bias = op[ops.P_BIAS]
    _multiply_out(op, op[ops.P_MATRIX], bias, out, x, xs, num_rows, begin, end, packed, tiles)
    if op[ops.P_ADDS]:
        for row in range(num_rows):
            numbers = floats(target + row * os + 4 * begin, end - begin)
            made = floats(scratch + row * os, end - begin)
            for n in range(end - begin):
                numbers[n] += made[n]
    if gate:
        bias = op[ops.P_GATE_BIAS]
        _multiply_out(op, gate, bias, other, x, xs, num_rows, begin, end, packed, tiles)
    if op[ops.P_ACTIVATION]:
        for row in range(num_rows):
            there = row * os + 4 * begin
            by = other + there if gate else 0
            activate(op[ops.P_ACTIVATION], out + there, by, end - begin)


@merged
def _run_product(op: Any, reals: Any, counter: int, num_rows: int, scratch: int) -> None:
    x, xs, length = op[ops.P_X], op[ops.P_X_STRIDE], op[ops.P_LENGTH]
    task = add_shared(counter, 1)
    if task >= op[ops.TASKS]:
        return
    # each thread prepares rows for itself: cheaper than to wait for one
    if op[ops.P_NORM]:
        eps, wide = reals[ops.P_EPS - ops.REALS], 4 * length
        weight, bias = op[ops.P_NORM_WEIGHT], op[ops.P_NORM_BIAS]
        for row in range(num_rows):
            out = scratch + row * wide
            normalize(x + row * xs, out, length, op[ops.P_NORM], weight, bias, op[ops.KIND], eps)
        x, xs, scratch = scratch, wide, scratch + num_rows * wide
    packed, tiles = 0, 0
    if op[ops.P_TILES] and num_rows >= op[ops.P_TILES]:
        packed, tiles = scratch, scratch + 2 * length * ((num_rows + ROWS - 1) // ROWS * ROWS)
        pack(x, xs, num_rows, length, packed)
        scratch = tiles + SUM_BYTES
    while task < op[ops.TASKS]:
        _do_product(op, task, x, xs, packed, num_rows, tiles, scratch)
        task = add_shared(counter, 1)


@compiled
def _fix_widths(op: Any, reals: Any, row: int) -> None:
    """Norms over all queries, and all keys, of a row; then bounds."""
    x, eps, kind = op[ops.W_QKV] + row * op[ops.W_QKV_STRIDE], reals[1], op[ops.KIND]
    if op[ops.W_QUERY_NORM]:
        scale(x, op[ops.W_QUERIES], op[ops.W_QUERY_NORM], kind, eps)
        scale(x + 4 * op[ops.W_QUERIES], op[ops.W_KEYS], op[ops.W_KEY_NORM], kind, eps)
    clip = np.float32(reals[0])
    if clip > 0:
        numbers = floats(x, op[ops.W_ALL])
        for i in range(op[ops.W_ALL]):
            numbers[i] = min(max(numbers[i], -clip), clip)


@compiled
def _norm_row(op: Any, reals: Any, row: int) -> None:
    x, out = op[ops.N_X] + row * op[ops.N_X_STRIDE], op[ops.N_OUT] + row * op[ops.N_OUT_STRIDE]
    weight, bias, eps = op[ops.N_WEIGHT], op[ops.N_BIAS], reals[0]
    normalize(x, out, op[ops.N_LENGTH], op[ops.N_NORM], weight, bias, op[ops.KIND], eps)


@merged
def _num_tasks(op: Any, num_rows: int) -> Any:
    """Tasks of an operation that is no product."""
    if op[0] == ops.ATTEND:
        return num_rows * op[ops.A_KV_HEADS]
    if op[0] == ops.GROUP:
        return 1
    if op[0] == ops.GATHER:
        return gather_tasks(op)
    if op[0] == ops.EXPERT:
        return expert_tasks(op)
    if op[0] == ops.PACK:
        return panel_tasks(op)
    if op[0] == ops.PANEL_PRODUCT:
        return panel_product_tasks(op)
    if op[0] == ops.KEEP:
        return op[ops.A_NUM_BLOCKS]
    if op[0] == ops.LOOK:
        return op[ops.A_NUM_BLOCKS] * op[ops.A_HEADS]
    return num_rows


@merged
def _run_sweep_task(op: Any, reals: Any, task: int, scratch: int) -> None:
    code = op[0]
    if code == ops.PACK:
        pack_panel(op, reals, task, scratch)
    elif code == ops.PANEL_PRODUCT:
        multiply_panels(op, task, scratch)
    elif code == ops.KEEP:
        keep(op, reals, task)
    else:
        look(op, task, scratch)


@merged
def _run_task(op: Any, reals: Any, task: int, num_rows: int, scratch: int) -> None:
    code = op[0]
    if code == ops.ATTEND:
        attend(op, reals, task, scratch)
    elif code == ops.NORM:
        _norm_row(op, reals, task)
    elif code == ops.WIDTH_FIX:
        _fix_widths(op, reals, task)
    elif code == ops.ROUTE:
        route(op, reals, task, scratch)
    elif code == ops.GROUP:
        group(op, num_rows)
    elif code == ops.GATHER:
        gather(op, reals, task)
    elif code == ops.EXPERT:
        run_expert(op, task, scratch)
    elif code == ops.COMBINE:
        combine(op, task)
    else:
        _run_sweep_task(op, reals, task, scratch)


@merged
def _run_op(op: Any, reals: Any, counter: int, num_rows: int, scratch: int) -> None:
    """The share of one thread in an operation: it takes tasks until none is left."""
    if op[0] == ops.PRODUCT:
        _run_product(op, reals, counter, num_rows, scratch)
        return
    tasks = _num_tasks(op, num_rows)
    task = add_shared(counter, 1)
    while task < tasks:
        _run_task(op, reals, task, num_rows, scratch)
        task = add_shared(counter, 1)


@merged
def _word(shared: int, index: int) -> int:
    return shared + 8 * index


@compiled
def _wait_for_all(shared: int, threads: int) -> None:
    arrived = add_shared(_word(shared, ARRIVED), 1) + 1
    target = (arrived + threads - 1) // threads * threads
    looks = 0
    while get_shared(_word(shared, ARRIVED)) < target:
        looks += 1
        if looks > PATIENCE:
            yield_core()


@compiled
def rouse(shared: int, semaphores: int) -> None:
    """Begin an epoch, and wake who sleeps."""
    add_shared(_word(shared, EPOCH), 1)
    for thread in range(1, get_shared(_word(shared, THREADS))):
        if swap_shared(_word(shared, ASLEEP + LINE * thread), 0):
            post_semaphore(semaphores + SEMAPHORE_BYTES * thread)


@merged
def _run_share(shared: int, thread: int) -> None:
    """What one thread does of the program that shared words tell of."""
    threads = get_shared(_word(shared, THREADS))
    table, num_ops = get_shared(_word(shared, TABLE)), get_shared(_word(shared, NUM_OPS))
    counters, num_rows = get_shared(_word(shared, COUNTERS)), get_shared(_word(shared, NUM_ROWS))
    scratch = get_shared(_word(shared, SCRATCH))
    scratch += thread * get_shared(_word(shared, SCRATCH_BYTES))
    for i in range(num_ops):
        address = table + 8 * ops.COLUMNS * i
        op = words(address, ops.COLUMNS)
        reals = doubles(address + 8 * ops.REALS, ops.COLUMNS - ops.REALS)
        _run_op(op, reals, counters + 8 * i, num_rows, scratch)
        if threads > 1:
            _wait_for_all(shared, threads)


@compiled
def _wait_for_epoch(shared: int, thread: int, seen: int, semaphores: int) -> Any:
    """Look out for another epoch than one that was seen; sleep if none begins."""
    looks = 0
    asleep = _word(shared, ASLEEP + LINE * thread)
    while get_shared(_word(shared, EPOCH)) == seen:
        looks += 1
        if looks > LOOKS:
            swap_shared(asleep, 1)
            # who gives out a program begins the epoch first, and looks for sleepers then
            if get_shared(_word(shared, EPOCH)) == seen or not swap_shared(asleep, 0):
                wait_semaphore(semaphores + SEMAPHORE_BYTES * thread)
            looks = 0
    return get_shared(_word(shared, EPOCH))


@compiled
def work(shared: int, thread: int, semaphores: int) -> None:
    """Run a program with all threads, if this is the first, 0; else help with all that come.

    It is one function, because what it contains takes long to compile.
    """
    seen = 0
    while True:
        if thread:
            seen = _wait_for_epoch(shared, thread, seen, semaphores)
            if get_shared(_word(shared, IS_OVER)):
                return
        else:
            rouse(shared, semaphores)
        _run_share(shared, thread)
        if not thread:
            return
