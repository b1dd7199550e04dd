"""Weights in the order in which oneDNN multiplies by them, for serving in bf16 or fp32 on a CPU.

A packed weight can be multiplied by and counted, not read, saved or moved.
"""

import torch
from torch import Tensor, nn

PACKED_TYPES = (torch.bfloat16, torch.float32)
PACKED_ROWS = 32  # for which rows of x oneDNN chooses the order; it serves any number
# A side that is no multiple of this is filled up.
PACKED_BLOCK = 64


def can_pack(dtype: torch.dtype) -> bool:
    """Whether packing pays on this CPU.

    A Xeon with AMX, two threads, 2048 x 768: in bf16 0.13 -> 0.09 ms for one row, 0.16 -> 0.11 for
    32. In fp32 a step of a T5 of 248 million parameters takes one thread 48 -> 55 ms for one row,
    but 86 -> 59 for 4 and 118 -> 74 for 8.
    """
    has_onednn = hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported")
    if dtype not in PACKED_TYPES or not has_onednn:
        return False
    return dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def pack_weight(weight: Tensor) -> Tensor:
    """A packed copy of a matrix (outputs, inputs)."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_ROWS)
    return packed


def packed_product(x: Tensor, weight: Tensor) -> Tensor:
    """Product of x (..., inputs) and a packed matrix."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return product


@torch.no_grad()
def pack_linears(model: nn.Module, kind: type[nn.Linear]) -> None:
    """Pack the weights of all products of that kind in place, one by one: the old ones are let go.

    A tied embedding stays as it is: it is looked up as well, and would be there twice.
    """
    for module in model.modules():
        if isinstance(module, kind) and not module.weight.is_mkldnn:
            module.weight = nn.Parameter(pack_weight(module.weight), requires_grad=False)
