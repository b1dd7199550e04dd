"""Computing in shapes that do not depend on who else is in the batch.

Kernels sum in an order that may change with the number of rows; in tiles of a fixed number of rows,
whichever row of the tile it is and whatever the others hold, it does not.

Shape letters: N rows, I inputs, F width.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

# Of a sweep of the encoder and of a step of the decoder. Packed bf16, two threads, 2304 x 768: 0.10
# ms for one row, 0.12 for 32, 0.16 for 64; fp32 0.13, 0.35 for 16, 0.60 for 32.
SWEEP_ROWS = 64
STEP_ROWS = {torch.bfloat16: 32, torch.float32: 16}
# Torch computes what is left over of two vectors with other code than whole vectors, and shares
# more elements than this out among threads, wherever the borders come to lie.
VECTOR_ELEMENTS = 64
SHARED_ELEMENTS = 32768


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile_rows: int) -> Tensor:
    """The function, row by row of x (..., I), computed in tiles; the last is filled with zeros."""
    x_NI = x.reshape(-1, x.shape[-1]).contiguous()
    parts = []
    for tile in torch.split(x_NI, tile_rows):
        missing = tile_rows - len(tile)
        part = function(F.pad(tile, (0, 0, 0, missing)) if missing else tile)
        parts.append(part[: len(tile)])
    whole = parts[0] if len(parts) == 1 else torch.cat(parts)
    return whole.view(*x.shape[:-1], whole.shape[-1])


def in_vectors(function: Callable[[Tensor], Tensor], x_NF: Tensor) -> Tensor:
    """An elementwise function, computed in whole vectors by one thread.

    With GELU in fp32, 2 rows of 48 differ from the same rows alone; with three threads 7 of 4096.
    """
    width = x_NF.shape[-1]
    padded_NF = F.pad(x_NF, (0, -width % VECTOR_ELEMENTS)) if width % VECTOR_ELEMENTS else x_NF
    rows = max(SHARED_ELEMENTS // padded_NF.shape[-1], 1)
    parts = [function(part) for part in torch.split(padded_NF, rows)]
    return (parts[0] if len(parts) == 1 else torch.cat(parts))[:, :width]


def quantized_tile_rows(tile_rows: int) -> int:
    """Rows of a tile for quantised matrices: they are dequantised for more than a few.

    A step computes its few rows one by one, which is the faster way.
    """
    return tile_rows if tile_rows == SWEEP_ROWS else 1
