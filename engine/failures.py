"""What an error of a step means beyond the request that it struck: no memory, or no device."""

from collections.abc import Iterator

import torch

# RuntimeError is all that torch raises for these, so the words have to tell.
MEMORY_MARKS = ("out of memory", "DefaultCPUAllocator", "CUBLAS_STATUS_ALLOC_FAILED")
DEVICE_MARKS = ("CUDA error", "cudaError")


class DeviceLost(Exception):
    """The device computes nothing any more until the process starts anew."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether less at once might do."""
    return any(
        isinstance(cause, MemoryError | torch.OutOfMemoryError) or _tells(cause, MEMORY_MARKS)
        for cause in _causes(error)
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether the same error will meet everything that comes after it.

    Errors of CUDA stay in its context: each later call fails as the first one did. Want of memory
    is the exception.
    """
    return not is_out_of_memory(error) and any(
        isinstance(cause, torch.AcceleratorError) or _tells(cause, DEVICE_MARKS)
        for cause in _causes(error)
    )


def _tells(error: BaseException, marks: tuple[str, ...]) -> bool:
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, and what it was made of."""
    while error is not None:
        yield error
        error = error.__cause__
