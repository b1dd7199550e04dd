"""What this process holds in memory now, and held at most."""

import ctypes
import gc
import re
import resource
from pathlib import Path

import torch


def peak_memory(device: torch.device) -> int:
    """Bytes that tensors took at most on a GPU, or this process with its libraries without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_bytes(field: str) -> int:
    """Memory that this process holds (VmRSS) or held at most (VmHWM)."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    found = re.search(rf"^{field}:\s*(\d+) kB", text, re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def reset_peak() -> None:
    """Let the peak begin again at what is held now."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def trim_memory() -> None:
    """Give back what is no longer used, and what is free in the heap."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
