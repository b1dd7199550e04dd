"""One run of the benchmark of inheritance: begin a model from a parent, train it, keep its curve.

A run that is done leaves one JSON file, written atomically, and is not trained again. One that was
stopped goes on from its last state, which it keeps each minute, with the same losses.
"""

import json
import math
import shutil
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from engine.checkpoint_writer import sync
from engine.config import ModelConfig
from engine.model.initial import initialize
from engine.model.transformer import Transformer
from training.bench_inheritance_steps import (
    Shape,
    Texts,
    draw_windows,
    make_optimizer,
    update,
    valid_loss,
)
from training.flops import forward_flops, training_flops
from training.growth import GrowthPlan, grow, prepare_growth
from training.growth_optimizer import Moments, grow_moments, parameter_order, read_run
from training.routing import set_routing
from training.state import STATE_FILE, load_state, read_state, save_state

TextName = Literal["all", "small"]
SAVE_S = 60.0  # processor seconds between the states of a run under way


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A run to make. It begins at random, or from the state that `parent` had after some steps.

    Without `growth` a parent is continued. `first_batch` is the place in the order of the data,
    `balanced_until` the share of the steps in which tokens are assigned evenly to experts.
    """

    name: str
    config: ModelConfig
    steps: int
    rate: float
    parent: str = ""
    parent_step: int = 0
    growth: GrowthPlan | None = None
    moments: Moments = "reset"
    first_batch: int = 0
    text: TextName = "all"
    teacher: str = ""
    teacher_step: int = 0
    inherit_steps: int = 0
    balanced_until: float = 0.0
    keep: tuple[int, ...] = ()


class Point(NamedTuple):
    """A place on a curve: steps, operations and processor seconds so far, validation loss."""

    step: int
    flops: float
    seconds: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """A run that is done. `charged` is what its ancestors and teachers cost, (flops, seconds)."""

    name: str
    seed: int
    points: list[Point]
    charged: tuple[float, float] = (0.0, 0.0)

    def at(self, step: int) -> Point:
        """The point at a step. Raises ValueError if the run was not evaluated then."""
        for point in self.points:
            if point.step == step:
                return point
        raise ValueError(f"{self.name} was not evaluated at step {step}")


class Workshop:
    """The folder of a benchmark: makes runs, and finds those that are done."""

    def __init__(self, folder: Path, texts: Texts, shape: Shape, say: Callable[[str], None]):
        self.folder = folder
        self.texts = texts
        self.shape = shape
        self.say = say
        self.arms: dict[str, Arm] = {}
        self.keys = {
            "all": zlib.crc32(texts.train.tobytes()),
            "small": zlib.crc32(texts.small.tobytes()),
            "valid": zlib.crc32(texts.valid.tobytes()),
        }

    def run(self, arm: Arm, seed: int) -> Record:
        """The record of a run, made now unless it is there and was made of the same arm.

        Raises ValueError if the parent or teacher of the arm has not been run, or the loss is no
        number any more.
        """
        for name in filter(None, (arm.parent, arm.teacher)):
            if name not in self.arms:
                raise ValueError(f"{arm.name} comes of {name}, which has to be run before")
        self.arms[arm.name] = arm
        path = self.folder / f"{arm.name}-seed{seed}.json"
        made_of = self._made_of(arm)
        states = [self.state_folder(arm.name, step, seed) / STATE_FILE for step in arm.keep]
        if path.exists() and all(state.exists() for state in states):
            found = json.loads(path.read_text(encoding="utf-8"))
            if found["made_of"] == made_of:
                return self._read(found)
        record = self._make(arm, seed)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"made_of": made_of, **asdict(record)}), encoding="utf-8")
        sync(partial)
        partial.replace(path)
        shutil.rmtree(self._under_way(arm, seed), ignore_errors=True)
        end = record.points[-1]
        self.say(
            f"{arm.name} seed {seed}: loss {record.points[0].loss:.4f} -> {end.loss:.4f} in "
            f"{end.step} steps, {end.flops / 1e9:,.0f} GFLOP, {end.seconds:.0f} s"
        )
        return record

    def _made_of(self, arm: Arm) -> dict[str, Any]:
        """All that a run depends on, besides the seed, as its file has it."""
        texts = [self.keys[arm.text], self.keys["valid"]]
        made_of = {"shape": asdict(self.shape), "texts": texts, **self._lineage(arm)}
        found: dict[str, Any] = json.loads(json.dumps(made_of))  # tuples become lists
        return found

    def _lineage(self, arm: Arm) -> dict[str, Any]:
        """The arm and all that it comes from: a run of another parent is another run."""
        ancestors = [self.arms[name] for name in (arm.parent, arm.teacher) if name]
        return {"arm": asdict(arm), "of": [self._lineage(ancestor) for ancestor in ancestors]}

    @staticmethod
    def _read(found: dict[str, Any]) -> Record:
        points = [Point(*point) for point in found["points"]]
        flops, seconds = found["charged"]
        return Record(
            name=found["name"], seed=found["seed"], points=points, charged=(flops, seconds)
        )

    def _make(self, arm: Arm, seed: int) -> Record:
        model = Transformer(self.config(arm.name))
        initialize(model, seed)
        optimizer = make_optimizer(model, arm.rate)
        if arm.parent:
            self._begin(arm, seed, model, optimizer)
        teacher = None
        if arm.teacher:
            teacher = self._load(arm.teacher, arm.teacher_step, seed)
        points = self._train(arm, seed, model, optimizer, teacher)
        return Record(name=arm.name, seed=seed, points=points, charged=self.charge(arm, seed))

    def charge(self, arm: Arm, seed: int) -> tuple[float, float]:
        """What the ancestors and teachers of a run had cost, each once: (flops, seconds)."""
        steps: dict[str, int] = {}
        found = [arm]
        while found:
            of = found.pop()
            for name, step in ((of.parent, of.parent_step), (of.teacher, of.teacher_step)):
                if name:
                    steps[name] = max(step, steps.get(name, 0))
                    found.append(self.arms[name])
        points = [self.run(self.arms[name], seed).at(step) for name, step in steps.items()]
        return sum(point.flops for point in points), sum(point.seconds for point in points)

    def config(self, name: str) -> ModelConfig:
        """The config of a run's model: growth sets the eps of its norms."""
        arm = self.arms[name]
        if arm.growth is None:
            return arm.config
        return prepare_growth(self.config(arm.parent), arm.growth).target

    def state_folder(self, name: str, step: int, seed: int) -> Path:
        """Where a run keeps its state after so many steps."""
        return self.folder / "states" / f"{name}-seed{seed}-step{step}"

    def _under_way(self, arm: Arm, seed: int) -> Path:
        return self.folder / "states" / f"{arm.name}-seed{seed}-under-way"

    def _resume(
        self, arm: Arm, seed: int, model: Transformer, optimizer: torch.optim.Optimizer
    ) -> list[Point]:
        """Take up a run that was stopped; its points so far, none if there is no such run."""
        folder = self._under_way(arm, seed)
        if not (folder / STATE_FILE).exists():
            return []
        if read_state(folder / STATE_FILE)[0].get("made_of") != self._made_of(arm):
            return []
        facts: dict[str, Any] = {}
        load_state(folder, model, optimizer, more=facts)
        return [Point(*point) for point in facts["points"]]

    def _keep_under_way(
        self,
        arm: Arm,
        seed: int,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        points: list[Point],
    ) -> None:
        folder = self._under_way(arm, seed)
        folder.mkdir(parents=True, exist_ok=True)
        facts: dict[str, Any] = {"points": points, "made_of": self._made_of(arm)}
        save_state(folder, points[-1].step, model, optimizer, **facts)

    def _load(self, name: str, step: int, seed: int) -> Transformer:
        config = self.config(name)
        model = Transformer(config)
        model.load_state_dict(read_run(self.state_folder(name, step, seed), config).weights)
        return model.eval()

    def _begin(
        self, arm: Arm, seed: int, model: Transformer, optimizer: torch.optim.Optimizer
    ) -> None:
        """Take over weights and moments of the parent, grown where the arm says so."""
        config = self.config(arm.parent)
        state = read_run(self.state_folder(arm.parent, arm.parent_step, seed), config)
        weights, moments = state.weights, state.moments
        if arm.growth is not None:
            growth = prepare_growth(config, replace(arm.growth, seed=seed))
            moments = grow_moments(moments, weights, growth, arm.moments)
            weights = grow(weights, growth)
        model.load_state_dict(weights)
        parameters = dict(model.named_parameters())
        for name in parameter_order(arm.config, "adamw"):
            found = {key: values[name] for key, values in moments.items() if name in values}
            if found:
                optimizer.state[parameters[name]] = {k: v.clone() for k, v in found.items()}

    def _train(
        self,
        arm: Arm,
        seed: int,
        model: Transformer,
        optimizer: torch.optim.Optimizer,
        teacher: Transformer | None,
    ) -> list[Point]:
        shape = self.shape
        text = self.texts.small if arm.text == "small" else self.texts.train
        step_flops = float(shape.rows * training_flops(arm.config, *shape.lengths))
        teaching = 0.0
        if teacher is not None:
            teaching = float(shape.rows * forward_flops(teacher.config, *shape.lengths).total)
        points = self._resume(arm, seed, model, optimizer)
        if not points:
            points = [Point(0, 0.0, 0.0, valid_loss(model, self.texts.valid, shape))]
        start, flops, seconds, _ = points[-1]
        kept_s = seconds
        for step in range(start, arm.steps):
            began = time.process_time()  # other processes on the machine do not count
            share = max(0.0, 1 - step / arm.inherit_steps) if arm.inherit_steps else 0.0
            for group in optimizer.param_groups:
                group["lr"] = arm.rate * min((step + 1) / shape.warmup_steps, 1.0)
            set_routing(model, balanced=step < arm.steps * arm.balanced_until)
            windows = draw_windows(text, seed, arm.first_batch + step, shape, shape.rows)
            loss = update(model, optimizer, windows, shape, teacher if share else None, share)
            if not math.isfinite(loss):
                raise ValueError(f"{arm.name}: loss is {loss} at step {step}; lower its rate")
            seconds += time.process_time() - began
            flops += step_flops + (teaching if share else 0.0)
            done = step + 1
            if done % shape.eval_every == 0 or done == arm.steps:
                points.append(
                    Point(done, flops, seconds, valid_loss(model, self.texts.valid, shape))
                )
            if done in arm.keep:
                folder = self.state_folder(arm.name, done, seed)
                folder.mkdir(parents=True, exist_ok=True)
                save_state(folder, done, model, optimizer)
            if points[-1].step == done < arm.steps and seconds >= kept_s + SAVE_S:
                self._keep_under_way(arm, seed, model, optimizer, points)
                kept_s = seconds
        return points
