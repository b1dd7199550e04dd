"""Where compiled code is kept, and that it need not be."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytest.importorskip("numba")

NORM = """
    import os
    import numpy as np
    from engine.kernels.compiled import cache_directory
    from engine.kernels.norms import scale

    x, weight = np.full(20, 3.0, np.float32), np.full(20, 2.0, np.float32)
    scale(x.ctypes.data, 20, weight.ctypes.data, 1, 0.0)
    assert np.allclose(x, 2.0), x
    print(repr(cache_directory()))
"""


def run(environment):
    """What a process with such an environment says of its directory."""
    plain = {k: v for k, v in os.environ.items() if k not in ("XDG_CACHE_HOME", "HOME")}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(NORM)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[1],
        env=plain | environment,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    return result.stdout.strip()


def test_works_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("no directory")
    assert run({"XDG_CACHE_HOME": str(tmp_path / "file")}) == "''"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_what_others_may_write_is_not_run(tmp_path):
    named = run({"XDG_CACHE_HOME": str(tmp_path)})
    Path(named.strip("'")).chmod(0o777)
    assert run({"XDG_CACHE_HOME": str(tmp_path)}) == "''"


def test_code_is_kept_and_found_again(tmp_path):
    first = run({"XDG_CACHE_HOME": str(tmp_path)})
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")}
    assert first.startswith(f"'{tmp_path}/infmoe/kernels-")
    assert kept
    assert run({"XDG_CACHE_HOME": str(tmp_path)}) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")} == kept
