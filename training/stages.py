"""What runs of several stages share: growing once, and telling that a stage is done."""

import json
import shutil
from pathlib import Path
from typing import Any

from training.growth_files import grow_directory
from training.growth_recipes import read_target

RECEIPT = "receipt.txt"
STAGE_FILE = "stage.json"
START = "start"


def grow_once(source: Path, growth: Path, out: Path) -> list[str]:
    """Grow a model to OUT/start, unless that has been done; the lines of the receipt."""
    receipt = out / RECEIPT
    if not receipt.exists():
        shutil.rmtree(out / START, ignore_errors=True)  # a kill came before the receipt
        out.mkdir(parents=True, exist_ok=True)
        lines = grow_directory(source, read_target(growth), out / START).summary()
        write_text(receipt, "\n".join(lines) + "\n")
    return receipt.read_text(encoding="utf-8").splitlines()


def read_stage(out: Path) -> dict[str, Any] | None:
    """What a stage came to; None if it is not done."""
    path = out / STAGE_FILE
    if not path.exists():
        return None
    facts: dict[str, Any] = json.loads(path.read_bytes())
    return facts


def write_stage(out: Path, facts: dict[str, Any]) -> None:
    """Note what a stage came to, which also tells that it is done."""
    write_text(out / STAGE_FILE, json.dumps(facts, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a file that is there whole, or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
