import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # tiny tensors: more threads cost more than they give
settings.register_profile("shared", deadline=None)  # a busy machine is no failure
settings.load_profile("shared")
# Of CI: the same draws at each run, so that no change is refused for a fault that was there before.
settings.register_profile("repeated", deadline=None, derandomize=True)

MAX_WORKERS = 4  # of 2 GB and more each
COMPILE = """
import torch
from engine.kernels.attach import warm_up
for threads in (1, 2):
    torch.set_num_threads(threads)
    warm_up()
"""


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_auto_num_workers():
    """One for each core; where there is a single one, all runs in this process."""
    from engine.cores import usable_cores

    cores = usable_cores()
    return min(cores, MAX_WORKERS) if cores > 1 else 0


def pytest_sessionstart(session):
    """Compile the kernels, which takes a busy machine minutes.

    Before tests that give servers a time to start, and before workers that would all do it.
    """
    config = session.config
    if hasattr(config, "workerinput") or config.option.collectonly or find_spec("numba") is None:
        return
    from engine.kernels.compiled import cache_directory

    kept = cache_directory()
    if kept and not any(Path(kept).rglob("*.nbi")):
        root = Path(__file__).parents[1]
        subprocess.run([sys.executable, "-c", COMPILE], check=True, cwd=root)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test draws is the same whichever tests ran before it in this process."""
    torch.manual_seed(0)
