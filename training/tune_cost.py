"""What tuning costs, measured: the memory that steps take at most, in a process of their own.

`python -m training.tune_cost` reads a probe as JSON and writes what it found as JSON.
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine.adapters import Slots
from engine.tokenizer import open_tokenizer
from training.growth_files import read_model_config
from training.process_memory import memory_bytes, reset_peak, trim_memory
from training.task_examples import read_examples
from training.tasks import Task, open_task
from training.tune import TuneData, TuneSettings, tune
from training.tune_model import Scorer
from training.tune_run import open_model
from training.tune_start import start_prompt

# of glibc: large blocks are given back at once, so that what is held is what is in use
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """Steps to take: of a model directory, on rows of a ready task, with so many vectors or all."""

    model: str
    data: str
    task: str
    run: str  # a folder that is not there yet
    vectors: int
    steps: int = 3
    rows: int = 16
    optimizer: str = "adafactor"
    full: bool = False


class Cost(NamedTuple):
    """What the steps took: memory above that of the libraries, processor time of the median one.

    Counted are weights, the best ones so far, gradients, optimiser and activations.
    """

    peak_bytes: int
    step_s: float


def measure_cost(probe: Probe) -> Cost:
    """Take the steps in a fresh process with one thread. Raises ValueError if that fails."""
    done = subprocess.run(
        [sys.executable, "-m", "training.tune_cost"],
        input=json.dumps(asdict(probe)),
        env=os.environ | ALLOCATOR | {"OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or f"status {done.returncode}").splitlines()[-1]
        raise ValueError(f"a probe of memory failed: {reason}")
    return Cost(**json.loads(done.stdout.splitlines()[-1]))


def take_steps(probe: Probe) -> Cost:
    """Take the steps in this process; what it holds now is not counted, the model is.

    A step is taken before, so that libraries have loaded what they want.
    """
    config = read_model_config(Path(probe.model))
    tokenizer = open_tokenizer(Path(probe.model), config.tokenizer)
    task = open_task(probe.task)
    data = TuneData(read_examples(Path(probe.data), task, tokenizer, config, probe.vectors))
    costs = []
    for name, steps in (("warm", 2), ("run", probe.steps + 1)):
        trim_memory()
        before = memory_bytes("VmRSS")
        reset_peak()
        with open_model(Path(probe.model), torch.float32, None) as model:
            prompt = None
            if not probe.full:
                slots = Slots(front=probe.vectors)
                prompt = start_prompt("random", slots, model, tokenizer, task, data.train, 0)
            scorer = Scorer(model, tokenizer, prompt)
            cost = _measured(scorer, data, task, _settings(probe, steps), Path(probe.run) / name)
            costs.append(cost._replace(peak_bytes=max(cost.peak_bytes - before, 0)))
        del model, scorer, prompt
    return costs[-1]


def _settings(probe: Probe, steps: int) -> TuneSettings:
    return TuneSettings(
        steps=steps,
        rows=probe.rows,
        full=probe.full,
        optimizer=probe.optimizer,  # type: ignore[arg-type]  # the settings check it
        eval_every=steps,
    )


def _measured(
    scorer: Scorer, data: TuneData, task: Task, settings: TuneSettings, run: Path
) -> Cost:
    """Peak and time of all steps but the last, after which the state is written as well."""
    costs: list[Cost] = []

    def note(row: dict[str, Any]) -> None:
        costs.append(Cost(memory_bytes("VmHWM"), row["cpu_s"]))

    tune(scorer, data, task, settings, run, on_step=note)
    return Cost(costs[-2].peak_bytes, statistics.median(cost.step_s for cost in costs[:-1]))


def main() -> None:
    """Read a probe, take its steps, tell what they took."""
    torch.set_num_threads(1)
    cost = take_steps(Probe(**json.load(sys.stdin)))
    sys.stdout.write(json.dumps(cost._asdict()) + "\n")


if __name__ == "__main__":
    main()
