"""Products of a few rows with a matrix as it is stored: against torch, and bit for bit."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

pytest.importorskip("numba")

from engine.kernels.ops import BF16, FP32
from engine.kernels.products import multiply
from engine.kernels.tiles import (
    DEPTH,
    OUTPUTS,
    ROWS,
    SUM_BYTES,
    has_tiles,
    multiply_in_tiles,
    pack,
)

KINDS = {torch.bfloat16: BF16, torch.float32: FP32}
LENGTHS = (1, 15, 16, 17, 31, 32, 33, 63, 70, 129)
GAP = 3  # of NaN behind each row of anything
needs_tiles = pytest.mark.skipif(not has_tiles(), reason="this CPU has no matrix unit")


def with_gaps(rows, width, dtype=torch.float32, seed=0):
    """Random rows in a larger matrix of NaN, which spoils whoever reads it."""
    generator = torch.Generator().manual_seed(seed)
    room = torch.full((rows, width + GAP), torch.nan, dtype=dtype)
    room[:, :width] = torch.randn(rows, width, generator=generator)
    return room[:, :width]


def product(x_RI, weight_OI, begin=0, end=None):
    """Outputs begin .. end - 1 of rows, in room that was filled with NaN; and that room."""
    end = len(weight_OI) if end is None else end
    room = torch.full((len(x_RI) + 1, len(weight_OI) + GAP), torch.nan)
    multiply(
        KINDS[weight_OI.dtype],
        x_RI.data_ptr(),
        4 * x_RI.stride(0),
        weight_OI.data_ptr(),
        weight_OI.stride(0) * weight_OI.element_size(),
        room.data_ptr(),
        4 * room.stride(0),
        x_RI.shape[1],
        len(x_RI),
        begin,
        end,
    )
    return room[: len(x_RI), begin:end], room


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dtype", KINDS)
def test_equals_torch_whatever_the_numbers_of_rows(dtype, length):
    weight_OI = with_gaps(37, length, dtype)
    for rows in range(1, 18):
        x_RI = with_gaps(rows, length, seed=rows)
        expected = (x_RI.double() @ weight_OI.double().T).float()
        torch.testing.assert_close(product(x_RI, weight_OI)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", KINDS)
def test_a_row_alone_gives_the_bits_that_it_gives_among_others(dtype):
    for length in LENGTHS:
        x_RI, weight_OI = with_gaps(17, length), with_gaps(37, length, dtype, seed=1)
        alone = torch.cat([product(x_RI[i : i + 1], weight_OI)[0] for i in range(17)])
        for rows in range(2, 18):
            assert torch.equal(product(x_RI[:rows], weight_OI)[0], alone[:rows])


@pytest.mark.parametrize("dtype", KINDS)
def test_any_part_of_the_outputs_has_the_bits_of_the_whole_and_nothing_else_is_written(dtype):
    weight_OI = with_gaps(37, 50, dtype)
    for rows in (1, 3, 8, 15):
        x_RI = with_gaps(rows, 50, seed=rows)
        whole = product(x_RI, weight_OI)[0]
        for begin, end in ((0, 1), (0, 16), (5, 37), (16, 32), (17, 19), (36, 37), (9, 9)):
            part, room = product(x_RI, weight_OI, begin, end)
            assert torch.equal(part, whole[:, begin:end])
            assert room.isfinite().sum() == part.numel()


@pytest.mark.parametrize("dtype", KINDS)
def test_what_is_not_finite_stays_in_its_row_and_its_output(dtype):
    x_RI, weight_OI = with_gaps(9, 40), with_gaps(20, 40, dtype, seed=1)
    expected = product(x_RI, weight_OI)[0]
    x_RI[3, 39], x_RI[5, 2] = torch.nan, torch.inf
    weight_OI[7, 33] = torch.nan
    found = product(x_RI, weight_OI)[0]
    assert found[3].isnan().all()
    assert found[:, 7].isnan().all()
    others = torch.ones_like(found, dtype=torch.bool)
    others[[3, 5]] = others[:, 7] = False
    assert not found[5].isfinite().any()
    assert torch.equal(found[others], expected[others])


def test_no_rows_and_no_outputs_are_nothing_to_do():
    x_RI, weight_OI = with_gaps(2, 40), with_gaps(20, 40)
    assert product(x_RI[:0], weight_OI)[1].isnan().all()
    assert product(x_RI, weight_OI, 20, 20)[1].isnan().all()


AT_THE_END_OF_MEMORY = """
    import ctypes, mmap
    import numpy as np
    from engine.kernels.curves import activate
    from engine.kernels.memory import store
    from engine.kernels.norms import normalize
    from engine.kernels.products import multiply

    kept, libc = [], ctypes.CDLL(None, use_errno=True)

    def at_the_end(count, size):
        '''An address of zeros behind which nothing may be read or written.'''
        whole = -(-count * size // mmap.PAGESIZE) * mmap.PAGESIZE
        kept.append(mmap.mmap(-1, whole + mmap.PAGESIZE))
        base = ctypes.addressof(ctypes.c_char.from_buffer(kept[-1]))
        assert libc.mprotect(ctypes.c_void_p(base + whole), mmap.PAGESIZE, 0) == 0
        return base + whole - count * size

    for length in (1, 17, 33, 70):
        for kind, size in ((0, 2), (1, 4)):
            for rows in (1, 3, 8):
                x, w = at_the_end(rows * length, 4), at_the_end(37 * length, size)
                out = at_the_end(rows * 37, 4)
                multiply(kind, x, 4 * length, w, size * length, out, 148, length, rows, 0, 37)
            x, out = at_the_end(length, 4), at_the_end(length, 4)
            weight = at_the_end(length, size)
            normalize(x, out, length, 2, weight, weight, kind, 1e-5)
            store(x, length, weight, kind)
            for number in range(1, 6):
                activate(number, x, out, length)
    print("whole")
"""


def test_nothing_is_read_or_written_beyond_what_is_given():
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(AT_THE_END_OF_MEMORY)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        timeout=300,
    )
    assert (result.stdout, result.returncode) == ("whole\n", 0), result.stderr


def tiled(x_RI, weight_OI, begin=0, end=None):
    """The same in tiles: outputs, where they end, and the room that they are in."""
    end = len(weight_OI) if end is None else end
    (rows, length), whole = x_RI.shape, -(-len(x_RI) // ROWS) * ROWS
    packed = torch.full((whole * length + GAP,), torch.nan, dtype=torch.bfloat16)
    tiles = torch.full((SUM_BYTES // 4 + GAP,), torch.nan)
    room = torch.full((rows + 1, len(weight_OI) + GAP), torch.nan)
    pack(x_RI.data_ptr(), 4 * x_RI.stride(0), rows, length, packed.data_ptr())
    last = multiply_in_tiles(
        packed.data_ptr(),
        weight_OI.data_ptr(),
        2 * weight_OI.stride(0),
        room.data_ptr(),
        4 * room.stride(0),
        length,
        rows,
        begin,
        end,
        tiles.data_ptr(),
    )
    assert packed[-GAP:].isnan().all()
    assert tiles[-GAP:].isnan().all()
    assert packed[:-GAP].isfinite().all()
    return room[:rows, begin:last], last, room


@needs_tiles
@pytest.mark.parametrize("length", [DEPTH, 3 * DEPTH])
def test_tiles_equal_torch_on_rows_rounded_to_bf16(length):
    weight_OI = with_gaps(150, length, torch.bfloat16)
    for rows in (1, 5, 15, 16, 17, 40):
        x_RI = with_gaps(rows, length, seed=rows)
        found, last, room = tiled(x_RI, weight_OI)
        assert last == 150 // OUTPUTS * OUTPUTS
        expected = x_RI.bfloat16().double() @ weight_OI[:last].double().T
        torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)
        assert room.isfinite().sum() == found.numel()


@needs_tiles
def test_a_row_in_tiles_has_the_same_bits_with_any_others_and_in_any_part():
    x_RI, weight_OI = with_gaps(40, 64), with_gaps(150, 64, torch.bfloat16, seed=1)
    whole, _, _ = tiled(x_RI, weight_OI)
    for row in (0, 7, 16, 39):
        assert torch.equal(tiled(x_RI[row : row + 1], weight_OI)[0][0], whole[row])
    for begin, end in ((0, 16), (16, 144), (32, 150), (48, 60), (3, 20)):
        part, last, room = tiled(x_RI, weight_OI, begin, end)
        assert last == begin + (end - begin) // OUTPUTS * OUTPUTS
        assert torch.equal(part, whole[:, begin:last])
        assert room.isfinite().sum() == part.numel()
