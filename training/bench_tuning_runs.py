"""One run of the benchmark of prompt tuning: tune, score the test rows, keep what came of it.

A run that is done leaves one JSON file, written atomically, and is not made again; one that was
stopped goes on from its last evaluation.
"""

import json
import shutil
import statistics
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.adapters import model_fingerprint
from engine.checkpoint_any import load_any
from engine.checkpoint_writer import sync
from engine.tokenizer import Tokenizer
from training.bench_tuning_arms import Arm, spread
from training.metrics import Metrics
from training.task_eval import ask
from training.task_examples import Example
from training.tasks import Task
from training.tune import Tuned, TuneData, tune
from training.tune_model import Scorer, SoftPrompt
from training.tune_start import start_prompt

Say = Callable[[str], None]
PROMPT = "prompt"  # the tensor's name in a file of a prompt


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A run that is done. `curve` has step, score of the dev rows and processor seconds so far.

    `scores` are those of the labels of each test row, and `best_step` where its weights are from.
    """

    name: str
    seed: int
    num_trained: int
    step_s: float
    best_step: int
    curve: list[tuple[int, float, float]]
    scores: list[list[float]]


@dataclass(frozen=True, slots=True)
class Rows:
    """What an arm learns: a task, its rows, and the test rows if it is scored on such."""

    task: Task
    data: TuneData
    test: list[Example]


class Workshop:
    """Makes runs of one model, or finds them made."""

    def __init__(
        self, model: Path, tokenizer: Tokenizer, rows: dict[str, Rows], folder: Path, say: Say
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.rows = rows
        self.folder = folder
        self.say = say
        self.arms: dict[str, Arm] = {}
        self.base = model_fingerprint(load_any(model, torch.float32))
        self.sums = {name: zlib.crc32(repr(found).encode()) for name, found in rows.items()}

    def untuned(self) -> list[list[float]]:
        """Scores of the test rows by the model as it is."""
        path = self.folder / f"untuned-{self.base[-8:]}-{self.sums['all']:08x}.json"
        if not path.exists():
            rows = self.rows["all"]
            scorer = Scorer(load_any(self.model, torch.float32), self.tokenizer)
            _write_json(path, ask(scorer, rows.test, rows.task).scores)
        scores: list[list[float]] = json.loads(path.read_text(encoding="utf-8"))
        return scores

    def run(self, arm: Arm, seed: int, parent_seed: int | None = None) -> Record:
        """The record of a run, made now unless it is there and was made of the same arm."""
        self.arms[arm.name] = arm
        path = self.folder / f"{arm.name}-seed{seed}.json"
        made_of = json.loads(json.dumps(self._made_of(arm, seed, parent_seed)))
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            if found.pop("made_of") == made_of:
                found["curve"] = [tuple(point) for point in found["curve"]]
                return Record(**found)
        record = self._make(arm, seed, parent_seed, json.dumps(made_of))
        _write_json(path, {"made_of": made_of, **asdict(record)})
        self.say(
            f"{arm.name} seed {seed}: dev {max(p[1] for p in record.curve):.4f} at step "
            f"{record.best_step}, {record.step_s:.3f} s a step"
        )
        return record

    def _made_of(self, arm: Arm, seed: int, parent_seed: int | None) -> dict[str, Any]:
        """All that a run depends on: with another parent it is another run."""
        of = None
        if arm.parent:
            of = self._made_of(self.arms[arm.parent], self._parent_seed(seed, parent_seed), None)
        return {
            "arm": asdict(arm),
            "seed": seed,
            "base": self.base,
            "rows": self.sums[arm.rows],
            "of": of,
        }

    @staticmethod
    def _parent_seed(seed: int, parent_seed: int | None) -> int:
        return seed if parent_seed is None else parent_seed

    def _prompt_file(self, name: str, seed: int) -> Path:
        return self.folder / f"{name}-seed{seed}.safetensors"

    def _make(self, arm: Arm, seed: int, parent_seed: int | None, key: str) -> Record:
        rows = self.rows[arm.rows]
        data = rows.data
        if arm.rows == "few":
            data = _few(data, seed)
        model = load_any(self.model, torch.float32)
        scorer = Scorer(model, self.tokenizer)
        if arm.vectors:
            mark = self.tokenizer.encode(rows.task.mark)[-1] if rows.task.mark else 0
            slots = spread(arm.vectors, arm.places, mark)
            if arm.parent:
                file = self._prompt_file(arm.parent, self._parent_seed(seed, parent_seed))
                scorer.prompt = SoftPrompt(load_file(file)[PROMPT], slots, arm.mask)
            else:
                scorer.prompt = start_prompt(
                    "labels", slots, model, self.tokenizer, rows.task, data.train, seed
                )
                scorer.prompt.mask = arm.mask
        seconds: list[float] = []
        run = self.folder / "states" / f"{arm.name}-seed{seed}-{zlib.crc32(key.encode()):08x}"
        tune(
            scorer,
            data,
            rows.task,
            arm.settings(seed),
            run,
            key,
            lambda row: seconds.append(row["cpu_s"]),
        )
        noted = Metrics(run / "metrics.jsonl", arm.steps).rows
        step_s = statistics.median(seconds or [row["cpu_s"] for row in noted])
        if scorer.prompt is not None:
            _write_prompt(self._prompt_file(arm.name, seed), scorer.prompt.prompt_PD)
        record = Record(
            name=arm.name,
            seed=seed,
            num_trained=Tuned(model, scorer.prompt, full=arm.full).num_trained,
            step_s=step_s,
            best_step=noted[-1]["best_step"],
            curve=[(row["step"], row["dev"], row["step"] * step_s) for row in noted],
            scores=ask(scorer, rows.test, rows.task).scores,
        )
        shutil.rmtree(run)
        return record


def _few(data: TuneData, seed: int) -> TuneData:
    """As many rows to learn from as to choose by, others for each seed."""
    count = len(data.dev)
    start = count * 2 * seed
    rows = [data.train[(start + i) % len(data.train)] for i in range(2 * count)]
    return TuneData(rows[:count], rows[count:])


def _write_prompt(path: Path, prompt_PD: Tensor) -> None:
    partial = path.with_suffix(".partial")
    save_file({PROMPT: prompt_PD.detach().contiguous()}, partial)
    sync(partial)
    partial.replace(path)


def _write_json(path: Path, value: object) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value), encoding="utf-8")
    sync(partial)
    partial.replace(path)
