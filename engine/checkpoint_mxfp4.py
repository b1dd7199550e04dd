"""Weights of 4 bits in blocks that share a scale, as gpt-oss is released.

Source: OCP Microscaling Formats v1.0 (MXFP4): E2M1 elements, 32 to a block, E8M0 scales.
"""

import torch
from torch import Tensor

BLOCK = 32  # elements that share a scale
BLOCK_BYTES = BLOCK // 2
BIAS = 127  # of the scale, which is an exponent of 2
LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # of codes 0 to 7; 8 to 15 are negative


def dequantize_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """The matrix (N, K) in bfloat16, which holds each element exactly.

    `blocks` (N, K / 32, 16) and `scales` (N, K / 32) are bytes; a byte has two elements, the first
    in its low bits. The byte 0x2f and scale 128 give -12.0 and 2.0.
    """
    levels = torch.tensor([*LEVELS, *(-level for level in LEVELS)])
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2)
    exponents = scales.to(torch.int32).unsqueeze(-1) - BIAS
    return torch.ldexp(levels[codes.long()], exponents).bfloat16().flatten(1)
