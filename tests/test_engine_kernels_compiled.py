"""Where compiled code is kept, and that it need not be."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from pickle import UnpicklingError

import pytest

pytest.importorskip("numba")

from numba.core import config

from engine.kernels import compiled, processor, warm

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


WARM = """
    import sys
    from engine.kernels import warm

    warm.compile_elsewhere()
    print(len(warm.work.signatures), "torch" in sys.modules)
    warm.compile_work()
    print(sum(warm.work.stats.cache_hits.values()), sum(warm.work.stats.cache_misses.values()))
"""


def test_another_process_compiles_what_this_one_then_finds(tmp_path):
    """Twice: the second time there is nothing to do."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(WARM)],
            capture_output=True,
            text=True,
            check=True,
            cwd=Path(__file__).parents[1],
            env=environment,
            timeout=900,
        )
        assert done.stdout.split("\n")[:2] == ["0 False", "1 0"]
        kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")}
        assert any(path.name.startswith("program.work-") for path in kept)
        environment["PATH"] = "/nowhere"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nb*")} == kept


@pytest.mark.parametrize("executable", ["none", "killed", None])
def test_where_no_process_can_be_started_this_one_compiles(
    tmp_path, monkeypatch, caplog, executable
):
    killed = tmp_path / "killed"
    killed.write_text("#!/bin/sh\nkill -9 $$\n")
    killed.chmod(0o700)
    monkeypatch.setattr(warm, "cache_directory", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "executable", executable and str(tmp_path / executable))
    warm.compile_elsewhere()
    assert "compiled by this process" in caplog.text


def test_the_process_that_compiles_reads_nothing_of_ours(tmp_path, monkeypatch, caplog):
    """Not what is sent to this one, for which it would wait."""
    reads = tmp_path / "reads"
    reads.write_text("#!/bin/sh\nread line\nexit 0\n")
    reads.chmod(0o700)
    monkeypatch.setattr(warm, "cache_directory", lambda: str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(reads))
    ours, theirs = os.pipe()
    kept = os.dup(0)
    try:
        os.write(theirs, b"a line\n")
        os.close(theirs)  # else to read what was taken would never end
        os.dup2(ours, 0)
        warm.compile_elsewhere()
        assert os.read(ours, 100) == b"a line\n"
    finally:
        os.dup2(kept, 0)
        os.close(ours)
        os.close(kept)
    assert not caplog.text


@pytest.mark.parametrize("error", [EOFError, UnpicklingError])
def test_what_was_kept_and_is_damaged_is_compiled_anew(tmp_path, monkeypatch, caplog, error):
    index = tmp_path / "kernels" / "program.work-1.py311.nbi"
    index.parent.mkdir()
    index.touch()

    class Work:
        """Loads what is there."""

        def compile(self, _signature):
            if index.exists():
                raise error("torn")

    monkeypatch.setattr(warm, "cache_directory", lambda: str(tmp_path))
    monkeypatch.setattr(warm, "work", Work())
    warm.compile_work()
    assert not index.exists()
    assert "damaged" in caplog.text


def test_code_is_kept_for_what_the_system_allows(tmp_path, monkeypatch):
    """Code that was made without tiles would leave out what only they compute."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = set()
    for is_allowed in (False, True):
        monkeypatch.setattr(compiled, "has_tiles", lambda is_allowed=is_allowed: is_allowed)
        found.add(compiled.cache_directory.__wrapped__())
    assert len(found) == 2


def test_code_for_another_processor_has_no_tiles(monkeypatch):
    """As NUMBA_CPU_NAME=generic asks for: LLVM would end the process at an unknown instruction."""
    monkeypatch.setattr(config, "CPU_FEATURES", "")
    assert not processor.has_tiles.__wrapped__()


def test_it_is_told_where_nothing_can_be_kept(monkeypatch, caplog):
    monkeypatch.setattr(warm, "cache_directory", str)
    warm.compile_elsewhere()
    assert "cannot be kept" in caplog.text
