"""Prompt tuning: a frozen model, a few trained vectors, and what they are compared with.

Source: Lester et al. (arXiv:2104.08691); CPM-2 (arXiv:2106.10715) s4.
"""

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from engine.errors import ConfigError
from engine.model.moe import ResidentExperts
from engine.model.transformer import Transformer
from training.metrics import Metrics
from training.offloaded_gradients import borrowed_again
from training.optimizers import AdafactorHF
from training.run_lock import LOCK, locked
from training.state import load_state, save_state
from training.task_eval import TaskReport, evaluate_task
from training.task_examples import Example
from training.tasks import Task
from training.tune_masks import Mask
from training.tune_model import Scorer, SoftPrompt

OptimizerName = Literal["adafactor", "adam"]
Schedule = Literal["constant", "linear"]
# constant rates: Lester's, CPM-2's for most tasks; of all weights: T5's, and above CPM-2's 5e-6
RATES = {("adafactor", False): 0.3, ("adam", False): 0.005}
FULL_RATES = {("adafactor", True): 1e-3, ("adam", True): 1e-5}
DECAYS = {"adafactor": 1e-5, "adam": 0.01}

OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuneSettings:
    """How a prompt is trained. `patience` is in evaluations; 0 never stops early.

    With `full` the weights are trained, and the prompt with them if there is one. A `linear`
    schedule lowers the rate from step to step, to 0 after the last. `mask`: see `tune_masks`.
    """

    steps: int = 3000
    rows: int = 32
    accumulation: int = 1
    optimizer: OptimizerName = "adafactor"
    learning_rate: float | None = None
    schedule: Schedule = "constant"
    init: str = "labels"
    mask: Mask = "full"
    front: int | None = None
    middle: int | None = None
    back: int | None = None
    full: bool = False
    seed: int = 0
    clip: float = 1.0
    eval_every: int = 100
    patience: int = 10

    def __post_init__(self) -> None:
        for name in ("steps", "rows", "accumulation", "eval_every"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be 1 or more")
        for name in ("patience", "seed"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be 0 or more")
        for name in ("front", "middle", "back"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                raise ConfigError(f"{name} is {value!r}; it must be a whole number, 0 or more")
        for name in ("clip", "learning_rate"):
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and value > 0):
                raise ConfigError(f"{name} is {value!r}; it must be above 0")
        self._check_names()

    def _check_names(self) -> None:
        for name, kind in (("optimizer", OptimizerName), ("schedule", Schedule), ("mask", Mask)):
            if getattr(self, name) not in get_args(kind):
                allowed = ", ".join(get_args(kind))
                raise ConfigError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")
        if self.full and self.mask != "full":
            raise ConfigError(f"mask {self.mask} is for a frozen model; do not train its weights")

    @property
    def rate(self) -> float:
        """The learning rate, given or the usual one."""
        return self.learning_rate or (RATES | FULL_RATES)[self.optimizer, self.full]

    def rate_at(self, step: int) -> float:
        """The learning rate of a step; the first is 0."""
        return self.rate * (1 - step / self.steps if self.schedule == "linear" else 1)


@dataclass(frozen=True, slots=True)
class TuneData:
    """Examples to learn from, and others to choose the best prompt by."""

    train: Sequence[Example]
    dev: Sequence[Example] = ()


@dataclass(slots=True)
class _Course:
    """What a run carries from evaluation to evaluation."""

    best: dict[str, Tensor]
    score: float = -math.inf
    step: int = 0
    waited: int = 0
    facts: dict[str, Any] = field(default_factory=dict)

    def note(self, score: float, step: int, weights: nn.Module) -> None:
        """Keep the weights if they are better than all before."""
        if score > self.score:
            self.best = _copy(weights)
            self.score, self.step, self.waited = score, step, 0
        else:
            self.waited += 1


class Tuned(nn.Module):
    """What is trained: a prompt, or the weights, or both; the rest of the model is frozen."""

    def __init__(self, model: Transformer, prompt: SoftPrompt | None, *, full: bool) -> None:
        super().__init__()
        model.requires_grad_(False)
        if full:
            if not isinstance(model.experts, ResidentExperts | None):
                raise ConfigError("full fine-tuning needs all experts in memory")
            if model.embedding.weight.dtype != torch.float32:
                raise ConfigError("full fine-tuning needs the model in fp32: give --dtype fp32")
            model.requires_grad_(True)
            for layer in model.moe_layers():
                layer.centroids.requires_grad_(model.config.router == "base_layer")
            self.model = model
        if prompt is not None:
            self.prompt = prompt

    @property
    def num_trained(self) -> int:
        """Trained parameters."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def tune(
    scorer: Scorer,
    data: TuneData,
    task: Task,
    settings: TuneSettings,
    run: Path,
    key: str = "",
    on_step: OnStep = lambda _: None,
) -> TaskReport | None:
    """Train the prompt of a scorer, or its model; leaves the best weights in it.

    Stopped and started again with the same run folder it goes on to the same result. `key` tells
    runs apart. Returns how well the best does on the dev rows, if there are some.
    Raises ValueError if the folder holds another run, CheckpointError if another process is at work
    in it, FloatingPointError if the loss is no number.
    """
    tuned = Tuned(scorer.model, scorer.prompt, full=settings.full)
    optimizer = _make_optimizer(tuned, settings)
    course = _Course(_copy(tuned))
    run.mkdir(parents=True, exist_ok=True)
    with locked(run / LOCK, str(run)), _gradients(scorer.model, full=settings.full):
        start = load_state(run, tuned, optimizer, course.best, course.facts)
        if course.facts.get("key", key) != key:
            raise ValueError(
                f"{run}: holds a run with other settings, data or model; name another folder with "
                "--run, or delete it"
            )
        for name in ("score", "step", "waited"):
            if start:
                setattr(course, name, course.facts[f"best_{name}"])
        metrics = Metrics(run / "metrics.jsonl", start)
        for step in range(start, settings.steps):
            if _is_over(course, settings):
                break
            began = time.process_time()  # other processes on the machine do not count
            loss = _take_step(scorer, data, task, settings, optimizer, step)
            row = {"step": step + 1, "loss": loss, "cpu_s": time.process_time() - began}
            is_last = step + 1 == settings.steps
            if is_last or (step + 1) % settings.eval_every == 0:
                row |= _evaluate(scorer, data, task, settings, course, tuned, step + 1)
                metrics.add(row)
                noted = {"key": key} | {
                    f"best_{n}": getattr(course, n) for n in ("score", "step", "waited")
                }
                save_state(run, step + 1, tuned, optimizer, course.best, **noted)
            on_step(row)
    tuned.load_state_dict(course.best)
    if not data.dev:
        return None
    return evaluate_task(scorer, data.dev, task, settings.rows)


def _is_over(course: _Course, settings: TuneSettings) -> bool:
    return 0 < settings.patience <= course.waited


def _evaluate(
    scorer: Scorer,
    data: TuneData,
    task: Task,
    settings: TuneSettings,
    course: _Course,
    tuned: Tuned,
    step: int,
) -> dict[str, Any]:
    """Score the dev rows; without such the last weights are the best."""
    if not data.dev:
        course.note(float(step), step, tuned)
        return {}
    report = evaluate_task(scorer, data.dev, task, settings.rows)
    course.note(report.score.value, step, tuned)
    return {"dev": report.score.value, "best": course.score, "best_step": course.step}


def _take_step(
    scorer: Scorer,
    data: TuneData,
    task: Task,
    settings: TuneSettings,
    optimizer: torch.optim.Optimizer,
    step: int,
) -> float:
    """One update; returns the loss, per token or per row."""
    optimizer.zero_grad(set_to_none=True)
    total, count = 0.0, 0
    for part in range(settings.accumulation):
        number = step * settings.accumulation + part
        chosen = draw(len(data.train), settings.rows, number, settings.seed)
        loss, weight = scorer.loss([data.train[i] for i in chosen], task)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
        count += weight
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad /= count
    norm = nn.utils.clip_grad_norm_(parameters, settings.clip)
    if not math.isfinite(total) or not bool(norm.isfinite()):
        raise FloatingPointError(
            f"step {step + 1}: the loss is no number any more; lower the learning rate"
        )
    for group in optimizer.param_groups:
        group["lr"] = settings.rate_at(step)
    optimizer.step()
    return total / count


def draw(num_examples: int, rows: int, number: int, seed: int) -> list[int]:
    """The examples of a batch: each pass goes through all of them in an order of its own."""
    chosen = []
    for place in range(number * rows, (number + 1) * rows):
        turn, index = divmod(place, num_examples)
        chosen.append(_order(num_examples, turn, seed)[index])
    return chosen


@lru_cache(maxsize=2)
def _order(num_examples: int, turn: int, seed: int) -> tuple[int, ...]:
    order = list(range(num_examples))
    random.Random(f"{seed} {turn}").shuffle(order)
    return tuple(order)


def _make_optimizer(tuned: Tuned, settings: TuneSettings) -> torch.optim.Optimizer:
    trained = [p for p in tuned.parameters() if p.requires_grad]
    decay = DECAYS[settings.optimizer]
    if settings.optimizer == "adam":
        return torch.optim.AdamW(trained, lr=settings.rate, weight_decay=decay)
    return AdafactorHF(trained, lr=settings.rate, weight_decay=decay, scale_parameter=settings.full)


def _gradients(model: Transformer, *, full: bool) -> AbstractContextManager[None]:
    """Frozen experts are borrowed again for gradients, whether they lie in slots or in memory."""
    return nullcontext() if full or model.experts is None else borrowed_again(model)


def _copy(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}
