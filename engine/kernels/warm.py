"""Has programs compiled by a process that ends: the compiler's memory, some 180 MiB, ends with it.

It imports no torch.
"""

import logging
import subprocess
import sys
from pathlib import Path

from numba import types

from engine.kernels.compiled import cache_directory
from engine.kernels.program import work

logger = logging.getLogger(__name__)

KEPT = "program.work-*.nbi"  # as Numba names it
SCRIPT = """
import sys
sys.path[:] = {path!r}
from engine.kernels.warm import compile_work
compile_work()
"""
LONGEST_S = 900.0


def compile_work() -> None:
    """Compile what runs programs, and keep it; or load what was kept.

    What cannot be read, as a machine went down before it was on disk, is made anew.
    """
    signature = (types.int64,) * 3
    try:
        work.compile(signature)  # type: ignore[attr-defined]  # a dispatcher
    except Exception as error:  # noqa: BLE001  what a damaged file gives is anything
        logger.warning("compiled kernels are damaged, and are compiled anew: %r", error)
        for index in Path(cache_directory()).rglob("*.nbi"):
            index.unlink(missing_ok=True)
        work.compile(signature)  # type: ignore[attr-defined]


def compile_elsewhere() -> None:
    """Have it compiled, unless that was done before or nothing can be kept.

    Where that fails this process will compile when it needs to.
    """
    directory = cache_directory()
    if not directory:
        logger.warning("compiled kernels cannot be kept: they are compiled at each start")
    elif not any(Path(directory).rglob(KEPT)):
        script = SCRIPT.format(path=sys.path)
        try:
            subprocess.run(
                [sys.executable or "", "-c", script],
                check=True,
                stdin=subprocess.DEVNULL,  # it is this process that is spoken to
                timeout=LONGEST_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("kernels are compiled by this process, as another could not: %s", error)
