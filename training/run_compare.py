"""Runs side by side: loss against tokens, seconds and operations, as a table and as curves.

What teachers computed is charged, and what it took to train them, where their runs are still there.
"""

import json
import logging
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
COSTS = ("flops", "teacher_flops")
ORIGIN = "origin.txt"  # in a run whose state was grown: the run that it grew from
GROWTH = "growth.json"  # in a grown model

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RunCurve:
    """The evaluations of a run: what had been spent by then, and the loss.

    `flops` are the model's own, `charged_flops` with the teachers' and with `sunk_flops`, which is
    what the runs of teachers and of the start had cost.
    """

    name: str
    steps: int
    sunk_flops: float
    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    flops: list[float] = field(default_factory=list)
    charged_flops: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best(self) -> float:
        """The lowest validation loss."""
        return min(self.losses)

    def reach(self, loss: float) -> int | None:
        """Index of the first evaluation that is as low; None if there is none."""
        return next((i for i, found in enumerate(self.losses) if found <= loss), None)


def read_curve(run: Path) -> RunCurve:
    """Read a run folder. Raises ValueError if it holds no evaluation."""
    rows = read_rows(run)
    sums = {
        key: list(accumulate(float(row.get(key, 0)) for row in rows))
        for key in ("tokens", "seconds", "flops", "teacher_flops")
    }
    sunk = sunk_flops(run)
    curve = RunCurve(str(run), rows[-1]["step"], sunk)
    for index, row in enumerate(rows):
        if "valid_loss" in row:
            curve.tokens.append(int(sums["tokens"][index]))
            curve.seconds.append(sums["seconds"][index])
            curve.flops.append(sums["flops"][index])
            curve.charged_flops.append(sunk + sums["flops"][index] + sums["teacher_flops"][index])
            curve.losses.append(row["valid_loss"])
    if not curve.losses:
        raise ValueError(f"{run}: has no evaluation yet; train it to its first one")
    return curve


def read_rows(run: Path) -> list[dict[str, Any]]:
    """The metrics of a run. Raises ValueError if there are none, or they are damaged."""
    path = run / METRICS
    if not path.exists():
        raise ValueError(f"{path}: does not exist; name the folder of a run that was trained")
    lines = path.read_bytes().splitlines(keepends=True)
    rows = [
        _read_row(path, number, line)
        for number, line in enumerate(lines, 1)
        if line.endswith(b"\n")  # no torn last one
    ]
    if not rows:
        raise ValueError(f"{path}: is empty; train the run first")
    return rows


def _read_row(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
        numbers = [row["step"], *(row.get(k, 0) for k in ("tokens", "seconds", *COSTS))]
        sum(numbers, row.get("valid_loss", 0))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path}, line {number}: is no line of metrics; take it away, or the whole run"
        ) from error
    return dict(row)


def sunk_flops(run: Path) -> float:
    """What the runs behind a run's teachers and start had computed, and those behind them.

    Each is charged once, whatever it was good for. What is not there any more costs nothing here,
    and a warning tells that.
    """
    rows = [row for ancestor in ancestors(run) for row in read_rows(ancestor)]
    return sum(float(row.get(key, 0)) for row in rows for key in COSTS)


def ancestors(run: Path) -> set[Path]:
    """The runs that a run could not have been without, as far as they are still there."""
    found: set[Path] = set()
    waiting = [run.resolve()]
    while waiting:
        for name in _named(waiting.pop()):
            source = find_run(name)
            if source is None and not _is_whole(name):
                logger.warning(
                    "%s: what %s cost is not charged: it, or what it grew from, has gone or was "
                    "moved",
                    run,
                    name,
                )
            if source is not None and source != run.resolve() and source not in found:
                found.add(source)
                waiting.append(source)
    return found


def _named(run: Path) -> list[Path]:
    """Models and runs that a run began with or learnt from."""
    record = run / "recipe.json"
    try:
        recipe = json.loads(record.read_bytes()) if record.exists() else {"train": {}}
        names = [*recipe.get("distill", {}).get("teachers", []), recipe["train"].get("start", "")]
        found = [Path(recipe.get("folder", ".")) / name for name in filter(None, names)]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{record}: is damaged, so what the run cost is not known") from error
    origin = run / ORIGIN
    return [*found, Path(origin.read_text(encoding="utf-8").strip())] if origin.exists() else found


def find_run(model: Path) -> Path | None:
    """The run that a model came from, through growth if it has grown; None if that is not known."""
    model = _trained(model)
    if (model / GROWTH).exists():
        return None
    return next((path for path in (model, model.parent) if (path / METRICS).exists()), None)


def _is_whole(model: Path) -> bool:
    """Whether all is there that a model or run came from, as far as records tell."""
    model = _trained(model)
    return model.exists() and not (model / GROWTH).exists()


def _trained(model: Path) -> Path:
    """What a model had been before it grew, if it has grown; as far back as that is known."""
    model = model.resolve()
    seen = set()
    while (record := model / GROWTH).exists() and model not in seen:
        seen.add(model)
        try:
            source = json.loads(record.read_bytes())["steps"][-1]["receipt"]["source"]
            model = (model / source).resolve()
        except (ValueError, KeyError, IndexError, TypeError):
            break  # it does not tell, or is damaged: whoever reads the model complains
    return model


def make_table(curves: list[RunCurve]) -> list[str]:
    """The runs as lines of a table, and what it took each to reach the first one's best loss."""
    target = curves[0].best
    head = ("run", "steps", "tokens", "seconds", "flops", "charged", "best loss", "last loss")
    lines = [(*head, f"charged to {target:.3f}")]
    for curve in curves:
        index = curve.reach(target)
        reached = "-" if index is None else f"{curve.charged_flops[index]:.2e}"
        lines.append(
            (
                curve.name,
                f"{curve.steps:,}",
                f"{curve.tokens[-1]:,}",
                f"{curve.seconds[-1]:.1f}",
                f"{curve.flops[-1]:.2e}",
                f"{curve.charged_flops[-1]:.2e}",
                f"{curve.best:.4f}",
                f"{curve.losses[-1]:.4f}",
                reached,
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def as_json(curves: list[RunCurve]) -> str:
    """All numbers in one line."""
    return json.dumps([asdict(curve) for curve in curves])
