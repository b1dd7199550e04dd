"""Matrices of 8 or 4 bits per element that multiply as they lie in memory.

Shape letters: R rows of x, N outputs, K inputs, G groups of inputs, B blocks of outputs, W outputs
of a block.

int4: an element is (q - 8) * scale + zero, q in 0..15, scale and zero per output and group of
inputs. The bytes are in one order on every machine: outputs in blocks of 64, the last of which may
be shorter; in a block byte by byte for each input. Byte j of 0..31 holds output j of the block in
its low half and output j + 32 in its high half. In a shorter block byte j holds outputs 2j and
2j + 1. With 64 outputs and 2 inputs, bytes 0..31 are input 0, bytes 32..63 input 1.

Source: the order is that of torch's weight_to_int4pack_kernel (aten/native/cpu/int4mm_kernel.cpp)
as built for AVX-512, which packs in another order where vectors are shorter.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

logger = logging.getLogger(__name__)

BLOCK_OUTPUTS = 64
GROUP_SIZES = (128, 64, 32)  # what torch's packed product takes; 256 costs accuracy
# What a K must be a multiple of: torch's int8 product reads beyond a row that is not (seen with
# torch 2.13: garbage and crashes, no error), the int4 one groups inputs by 32 at least.
INPUT_MULTIPLES = {"int8": 16, "int4": 32}
# More rows than these are multiplied with the dequantised matrix. 10240 x 4096, one thread of a
# Xeon with AMX: a packed product takes 1 ms per row, dequantising 17 (int8) or 60 ms (int4).
MAX_PACKED_ROWS = {"int8": 16, "int4": 64}
CHUNK_OUTPUTS = 256  # dequantised at once: 2 MiB of bfloat16 at 4096 inputs, which caches hold


class QuantizedMatrix(Protocol):
    """What a feed-forward needs of a matrix (N, K) that is no tensor."""

    def linear(self, x_RK: Tensor) -> Tensor:
        """Product with each row of x, (R, N), in the dtype of x."""
        ...

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The elements, (N, K)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Int8Matrix:
    """Elements q_NK * scale_N: int8, and bfloat16 per output."""

    q_NK: Tensor
    scale_N: Tensor

    def linear(self, x_RK: Tensor) -> Tensor:
        """Product with each row of x, (R, N), in the dtype of x."""
        if x_RK.device.type != "cpu":
            return F.linear(x_RK, self.dequantize(x_RK.dtype))
        if len(x_RK) <= MAX_PACKED_ROWS["int8"] and int8_fallback() is None:
            return _int8_product(x_RK, self)
        dtype = _exact(x_RK.dtype)
        x_RK, outputs = x_RK.to(dtype), x_RK.dtype
        parts = [F.linear(x_RK, part.to(dtype)) for part in torch.split(self.q_NK, CHUNK_OUTPUTS)]
        return (torch.cat(parts, -1) * self.scale_N.to(dtype)).to(outputs)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The elements, (N, K)."""
        exact = _exact(dtype)
        return self.q_NK.to(exact).mul_(self.scale_N.to(exact).unsqueeze(1)).to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Int4Matrix:
    """Packed bytes (N, K / 2) in the order that the module tells; scale and zero in bfloat16.

    The group size is K / G.
    """

    packed: Tensor
    scale_zero_GN2: Tensor

    def linear(self, x_RK: Tensor) -> Tensor:
        """Product with each row of x, (R, N), in the dtype of x."""
        if x_RK.device.type != "cpu":
            return F.linear(x_RK, self.dequantize(x_RK.dtype))
        if len(x_RK) <= MAX_PACKED_ROWS["int4"] and int4_fallback() is None:
            return _int4_product(x_RK, self)
        chunks = self._dequantized(x_RK.dtype, CHUNK_OUTPUTS)
        return torch.cat([x_RK @ block_KW for chunk in chunks for block_KW in chunk], -1)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The elements, (N, K)."""
        chunks = self._dequantized(dtype, len(self.packed))
        return torch.cat([chunk_BKW.transpose(1, 2).flatten(0, 1) for chunk_BKW in chunks])

    def _dequantized(self, dtype: torch.dtype, max_outputs: int) -> Iterator[Tensor]:
        """The elements as (B, K, W), so many outputs at once."""
        num_groups = len(self.scale_zero_GN2)
        scale_GN, zero_GN = self.scale_zero_GN2.unbind(-1)
        begin = 0
        for q_BKW in _unpacked(self.packed, max_outputs):
            blocks, inputs, width = q_BKW.shape
            end = begin + blocks * width
            shape = (num_groups, blocks, 1, width)
            scale_BG1W, zero_BG1W = (
                part[:, begin:end].reshape(shape).transpose(0, 1).contiguous().to(_exact(dtype))
                for part in (scale_GN, zero_GN)
            )
            grouped = q_BKW.to(_exact(dtype)).view(blocks, num_groups, -1, width)
            result = torch.addcmul(zero_BG1W, grouped, scale_BG1W)
            yield result.to(dtype).view(blocks, inputs, width)
            begin = end


def pack_int4(q_NK: Tensor) -> Tensor:
    """Bytes (N, K / 2), in the order that the module tells, of uint8 numbers 0..15; N is even."""
    outputs, inputs = q_NK.shape
    assert outputs % 2 == 0
    num_blocks, half = outputs // BLOCK_OUTPUTS, BLOCK_OUTPUTS // 2
    whole = num_blocks * BLOCK_OUTPUTS
    low, high = q_NK[:whole].view(num_blocks, 2, half, inputs).unbind(1)
    blocks = (low | high << 4).transpose(1, 2)
    rest = (q_NK[whole::2] | q_NK[whole + 1 :: 2] << 4).T
    return torch.cat([blocks.flatten(), rest.flatten()]).view(outputs, inputs // 2)


def _unpacked(packed: Tensor, max_outputs: int) -> Iterator[Tensor]:
    """The numbers -8..7 that are packed, as int8 (B, K, W), so many outputs at once."""
    outputs, inputs = len(packed), 2 * packed.shape[1]
    whole = outputs // BLOCK_OUTPUTS * BLOCK_OUTPUTS
    if whole:
        at_once = max(max_outputs // BLOCK_OUTPUTS, 1) * BLOCK_OUTPUTS
        for chunk in torch.split(packed[:whole], at_once):
            halves = chunk.reshape(-1, inputs, BLOCK_OUTPUTS // 2)
            yield torch.cat([halves & 15, halves >> 4], -1).sub_(8).view(torch.int8)
    if whole < outputs:
        pairs = packed[whole:].reshape(1, inputs, -1)
        yield torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2).sub_(8).view(torch.int8)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """The dtype to dequantise in; a scale may be too small for float16."""
    return torch.float32 if dtype == torch.float16 else dtype


def _int8_product(x_RK: Tensor, matrix: Int8Matrix) -> Tensor:
    operation = torch.ops.aten._weight_int8pack_mm
    product: Tensor = operation(_activations(x_RK), matrix.q_NK, matrix.scale_N)
    return product.to(x_RK.dtype)


def _int4_product(x_RK: Tensor, matrix: Int4Matrix) -> Tensor:
    operation = torch.ops.aten._weight_int4pack_mm_for_cpu
    group = x_RK.shape[1] // len(matrix.scale_zero_GN2)
    product: Tensor = operation(_activations(x_RK), matrix.packed, group, matrix.scale_zero_GN2)
    return product.to(x_RK.dtype)


def _activations(x_RK: Tensor) -> Tensor:
    return x_RK.to(torch.bfloat16).contiguous()


@lru_cache(maxsize=1)
def int8_fallback() -> str | None:
    """Why int8 matrices are dequantised for every product on this CPU; None if they are not."""
    q_NK = (_probe_numbers() % 255 - 127).to(torch.int8)
    matrix = Int8Matrix(q_NK, torch.linspace(0.5, 2.0, len(q_NK)).bfloat16())
    return _told("int8", _probe(matrix, lambda x_RK: _int8_product(x_RK, matrix)))


@lru_cache(maxsize=1)
def int4_fallback() -> str | None:
    """Why int4 matrices are dequantised for every product on this CPU; None if they are not."""
    q_NK = (_probe_numbers() % 16).to(torch.uint8)
    scale_zero_GN2 = torch.linspace(-2.0, 2.0, 2 * len(q_NK) * 2).view(2, -1, 2).bfloat16()
    matrix = Int4Matrix(pack_int4(q_NK), scale_zero_GN2)
    try:
        theirs = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q_NK.int(), 1)
    except (RuntimeError, AttributeError) as error:
        return _told("int4", f"this build of torch does not pack them: {error}")
    if not torch.equal(theirs, matrix.packed):
        cpu = torch.backends.cpu.get_cpu_capability()
        return _told("int4", f"torch packs them in another order on this CPU ({cpu})")
    return _told("int4", _probe(matrix, lambda x_RK: _int4_product(x_RK, matrix)))


def _probe_numbers() -> Tensor:
    """Integers (96, 64) without a pattern; 96 outputs are a whole block and a shorter one."""
    return torch.arange(96 * 64).view(96, 64) * 7919 % 10007


def _probe(matrix: QuantizedMatrix, product: Callable[[Tensor], Tensor]) -> str | None:
    """Compare torch's product with that of the dequantised matrix. Returns what is wrong."""
    x_RK = torch.linspace(-1.0, 1.0, 3 * 64).view(3, 64).bfloat16()
    expected = F.linear(x_RK.float(), matrix.dequantize())
    try:
        error = (product(x_RK).float() - expected).abs().max()
    except (RuntimeError, AttributeError) as problem:
        return f"this build of torch does not multiply them: {problem}"
    return None if error <= 0.01 * expected.abs().max() else "torch's packed product is wrong"


def _told(kind: str, reason: str | None) -> str | None:
    if reason is not None:
        logger.warning("%s experts are dequantised for every product: %s", kind, reason)
    return reason
