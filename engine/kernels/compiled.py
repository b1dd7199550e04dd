"""The decorator of functions that are compiled when first called, and kept on disk."""

import os
import stat
from collections.abc import Callable
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numba
from numba import njit
from numba.core import config
from numba.extending import intrinsic

from engine.kernels.processor import has_tiles

# Sums of a row may be taken in any order, the same each time.
LOOSE = {"reassoc", "contract", "nsz"}


@lru_cache(maxsize=1)
def cache_directory() -> str:
    """Where machine code of exactly these sources is kept.

    Empty if nothing can be written there, or others can write there as well. Numba itself looks
    only at the file of a function, not at what is compiled into it; nor at what the system allows:
    code that was made where tiles are forbidden computes nothing of what needs them.
    """
    digest = sha256(f"{numba.__version__} {has_tiles()}".encode())
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
        directory = base / "infmoe" / f"kernels-{digest.hexdigest()[:16]}"
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = directory.stat()
        if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return ""  # what others write there is not to be run
        with TemporaryDirectory(dir=directory):
            return str(directory)
    except (OSError, RuntimeError):  # the latter if there is no home
        return ""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function; it lets go of the interpreter's lock while it runs."""
    return _compiled(function, fastmath=False)


def compiled_loosely(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same where the order of sums does not matter."""
    return _compiled(function, fastmath=LOOSE)


def merged(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as a part of the one that calls it, and not a second time by itself."""
    made: Callable[..., Any] = njit(inline="always", error_model="numpy")(function)
    return made


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function of LLVM's own code, which compiled ones may call."""
    made: Callable[..., Any] = intrinsic(function)
    return made


def _compiled(function: Callable[..., Any], *, fastmath: bool | set[str]) -> Callable[..., Any]:
    directory = cache_directory()
    before = config.CACHE_DIR  # type: ignore[attr-defined]
    config.CACHE_DIR = directory  # type: ignore[attr-defined]
    try:
        make: Callable[..., Any] = njit(
            nogil=True, error_model="numpy", cache=bool(directory), fastmath=fastmath
        )
        found: Callable[..., Any] = make(function)
        return found
    finally:
        config.CACHE_DIR = before  # type: ignore[attr-defined]
