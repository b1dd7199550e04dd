import pytest
import torch

from engine.errors import CheckpointError
from engine.failures import is_device_lost, is_out_of_memory


def wrapped(error):
    try:
        raise CheckpointError("expert 3 cannot be read") from error
    except CheckpointError as outer:
        return outer


ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"


@pytest.mark.parametrize(
    ("error", "lacks_memory", "is_lost"),
    [
        (MemoryError(), True, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True, False),
        (RuntimeError(ALLOCATOR), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("cudaErrorMemoryAllocation: out of memory"), True, False),
        (torch.AcceleratorError("unspecified launch failure"), False, True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("cudaErrorIllegalAddress: an illegal memory access"), False, True),
        (RuntimeError("The size of tensor a (3) must match"), False, False),
        (CheckpointError("x: out of memory is no reason"), False, False),
    ],
)
def test_an_error_is_told_by_its_kind_and_words_also_where_it_was_translated(
    error, lacks_memory, is_lost
):
    for one in (error, wrapped(error)):
        assert (is_out_of_memory(one), is_device_lost(one)) == (lacks_memory, is_lost)
