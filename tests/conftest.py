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

COMPILE = """
import torch
from engine.kernels.attach import warm_up
for threads in (1, 2):
    torch.set_num_threads(threads)
    warm_up()
"""


@pytest.fixture(scope="session", autouse=True)
def _kernels_are_compiled():
    """Before tests that give servers a time to start: it takes a busy machine minutes."""
    if find_spec("numba") is None:
        return
    from engine.kernels.compiled import cache_directory

    kept = cache_directory()
    if kept and not any(Path(kept).rglob("*.nbi")):
        root = Path(__file__).parents[1]
        subprocess.run([sys.executable, "-c", COMPILE], check=True, cwd=root)
