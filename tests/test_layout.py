"""The one-way imports of the design, checked on the source of every module."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("server", "engine", "offload", "training")
ALLOWED = {
    "server": {"server", "engine"},
    "engine": {"engine", "offload"},
    "offload": {"offload"},
    "training": {"training", "engine"},
}
TRAINING_MAY = (
    *("config", "errors", "tokenizer", "checkpoint", "model", "experts", "adapters"),
    "prepare",  # tasks are scored as they are served
)


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any level, as dotted names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def modules() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    package = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        top = name.split(".")[0]
        if package == "server" and path.name == "__main__.py":
            continue  # puts the command together
        if top in PACKAGES:
            assert top in ALLOWED[package], f"{path.relative_to(ROOT)} imports {name}"
        if package == "training" and top == "engine":
            assert name.split(".")[1].startswith(TRAINING_MAY), f"{path.name} imports {name}"
        if package == "offload" and top == "torch":
            assert path.name in ("device.py", "cuda.py"), f"{path.name} imports {name}"
        if top == "cupy":
            assert path.relative_to(ROOT).as_posix() == "offload/cuda.py"


def test_package_inits_are_empty():
    for path in modules():
        if path.name == "__init__.py":
            assert not path.read_text(encoding="utf-8").strip(), path


WEB = {"fastapi", "starlette", "uvicorn"}


@pytest.mark.parametrize(
    ("packages", "unwanted"),
    [(("engine", "offload"), WEB | {"cupy", "transformers"}), (("offload",), {"torch", "cupy"})],
)
def test_importing_everything_loads_nothing_heavy_that_may_not_be_needed(packages, unwanted):
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in modules()
        if path.relative_to(ROOT).parts[0] in packages
    ]
    code = "import sys, importlib\nfor name in sys.argv[1:]: importlib.import_module(name)\n"
    code += f"sys.exit(', '.join(sorted({unwanted!r} & set(sys.modules))) or 0)"
    result = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_port_opens_before_torch_is_imported():
    code = "import sys, server.cli; sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False)
    assert result.returncode == 0
