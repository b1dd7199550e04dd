"""Products of a few rows with a matrix as it is stored.

The sum of each pair is taken in one order, whatever rows and outputs go together: a row gets the
same bits alone and among others.
"""

from engine.kernels.compiled import compiled
from engine.kernels.ops import BF16
from engine.kernels.vectors import NUM_SUMS, make_tile

BLOCK = 16  # outputs for which all rows are multiplied before the next ones are read
MOST, SOME, TWO = 8, 4, 2  # rows that are multiplied at once

HALF_8 = make_tile("bf16", NUM_SUMS // MOST, MOST)
HALF_4 = make_tile("bf16", NUM_SUMS // SOME, SOME)
HALF_2 = make_tile("bf16", NUM_SUMS // TWO, TWO)
HALF_1 = make_tile("bf16", NUM_SUMS, 1)
HALF_ONE = make_tile("bf16", 1, 1)
FULL_8 = make_tile("fp32", NUM_SUMS // MOST, MOST)
FULL_4 = make_tile("fp32", NUM_SUMS // SOME, SOME)
FULL_2 = make_tile("fp32", NUM_SUMS // TWO, TWO)
FULL_1 = make_tile("fp32", NUM_SUMS, 1)
FULL_ONE = make_tile("fp32", 1, 1)


@compiled
def multiply(  # noqa: PLR0913  two matrices, where they lie, and where to
    kind: int,
    x: int,
    xs: int,
    w: int,
    ws: int,
    out: int,
    os: int,
    length: int,
    num_rows: int,
    begin: int,
    end: int,
) -> None:
    """Write outputs begin .. end - 1 of rows of x (rows, length) and a matrix (outputs, length).

    Each of the three is an address and a stride.
    """
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        row = 0
        while row < num_rows:
            left = num_rows - row
            rows = MOST if left >= MOST else SOME if left >= SOME else TWO if left >= TWO else 1
            _block(kind, x + row * xs, xs, w, ws, out + row * os, os, length, rows, first, last)
            row += rows


@compiled
def _block(  # noqa: C901, PLR0913  a table of functions would not be compiled in
    kind: int,
    x: int,
    xs: int,
    w: int,
    ws: int,
    out: int,
    os: int,
    length: int,
    rows: int,
    begin: int,
    end: int,
) -> None:
    wide = NUM_SUMS // rows
    n = begin
    while n + wide <= end:
        here, there = w + n * ws, out + 4 * n
        if kind == BF16:
            if rows == MOST:
                HALF_8(x, xs, here, ws, there, os, length)
            elif rows == SOME:
                HALF_4(x, xs, here, ws, there, os, length)
            elif rows == TWO:
                HALF_2(x, xs, here, ws, there, os, length)
            else:
                HALF_1(x, xs, here, ws, there, os, length)
        elif rows == MOST:
            FULL_8(x, xs, here, ws, there, os, length)
        elif rows == SOME:
            FULL_4(x, xs, here, ws, there, os, length)
        elif rows == TWO:
            FULL_2(x, xs, here, ws, there, os, length)
        else:
            FULL_1(x, xs, here, ws, there, os, length)
        n += wide
    while n < end:
        for row in range(rows):
            here, there = w + n * ws, out + row * os + 4 * n
            if kind == BF16:
                HALF_ONE(x + row * xs, xs, here, ws, there, os, length)
            else:
                FULL_ONE(x + row * xs, xs, here, ws, there, os, length)
        n += 1
