"""What the processor of this machine can do, and the system lets this process do."""

import ctypes
import platform
import sys
from functools import lru_cache

from llvmlite import binding
from numba.core import config

PERMISSION, TILE_DATA = 0x1023, 18  # of arch_prctl; the state that must be asked for
ARCH_PRCTL = 158


@lru_cache(maxsize=1)
def has_tiles() -> bool:
    """Whether there is the matrix unit (AMX) for bf16, and code for it can be made and run."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    if config.CPU_FEATURES is not None:  # type: ignore[attr-defined]  # of NUMBA_CPU_FEATURES
        return False  # Numba was told what to compile for, and may not know the unit
    features = binding.get_host_cpu_features()
    if not (features.get("amx-tile") and features.get("amx-bf16")):
        return False
    return bool(ctypes.CDLL(None).syscall(ARCH_PRCTL, PERMISSION, TILE_DATA) == 0)


def has_wide_vectors() -> bool:
    """Whether 16 numbers of fp32 are one vector of this CPU, and 16 of those fit its registers."""
    return bool(binding.get_host_cpu_features().get("avx512f"))
