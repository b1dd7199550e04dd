"""How many threads are to compute: no more than this process gets cores for.

Threads that a quota stops in the middle of a product are waited for by all others.

Source: Linux, Documentation/scheduler/sched-bwc.rst; cgroup-v2.rst, section CPU.
"""

import logging
import math
import os
import sys
from pathlib import Path

from engine.cgroup import Place, own_groups

logger = logging.getLogger(__name__)


def usable_cores(root: Path = Path("/")) -> int:
    """Cores that this process may run on, or fewer if a quota allows the time of fewer.

    A quota of 1.5 cores gives 2, as one of its own group or of any above it. `root` is where /proc
    and /sys are looked for.
    """
    allowed = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    quotas = (_quota(place) for place in own_groups(root, "cpu"))
    return max(1, min([allowed, *(math.ceil(quota) for quota in quotas if quota is not None)]))


def set_threads(asked: int | None, root: Path = Path("/")) -> None:
    """Have torch, and with it the kernels, compute by so many threads.

    None leaves torch's own number, but no more than there are cores for. To be called before there
    is a thread that computes.
    """
    import torch  # not at the top: it takes seconds, and cores are counted without it

    own = torch.get_num_threads()
    threads = min(own, usable_cores(root)) if asked is None else asked
    if asked is None and threads < own:
        logger.info("computing by %d threads, as many as it gets cores, not %d", threads, own)
    if threads != own:
        torch.set_num_threads(threads)


def _quota(place: Place) -> float | None:
    """Cores whose time a group may use; None if it is not bounded, or not to be seen.

    Version 1 says -1 for no bound, version 2 `max`.
    """
    try:
        if place.version == 2:
            quota, period = (place.directory / "cpu.max").read_text().split()
        else:
            quota = (place.directory / "cpu.cfs_quota_us").read_text().strip()
            period = (place.directory / "cpu.cfs_period_us").read_text()
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        # Version 2 has none at its root, nor where the controller is off; sandboxes imitate these
        # files, more or less.
        return None
