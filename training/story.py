"""A story of stages: each grows the model of the one before and trains it on.

CPM-2's is Chinese, then bilingual, then a mixture of experts. Stages that are done are kept, one
that was stopped resumes.

Source: CPM-2 (arXiv:2106.10715) s2.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint import find_tokenizer_files, save_model
from engine.errors import ConfigError
from engine.model.initial import num_parameters
from training.loop import OnStep, TrainingData, begin_model, evaluate_groups, open_data, train
from training.recipe import Recipe, build_table, read_recipe, read_tables
from training.run_compare import read_rows
from training.stages import START, grow_once, read_stage, write_stage
from training.vocabulary import build_vocabulary, write_vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage: how the model before it grows, and the recipe that trains it on."""

    name: str
    recipe: str
    grow: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Story:
    """The stages, and the vocabulary of the first one if it is to be learnt."""

    folder: Path
    stages: tuple[Stage, ...]
    vocabulary: dict[str, Any] | None = None


def read_story(folder: Path) -> Story:
    """Read `story.toml` of a folder. Raises ConfigError if it cannot be understood."""
    path = folder / "story.toml"
    tables = read_tables(path)
    if unknown := sorted(tables.keys() - {"vocabulary", "stages"}):
        raise ConfigError(f"{path}: unknown tables {', '.join(unknown)}; known: vocabulary, stages")
    vocabulary = tables.get("vocabulary")
    if vocabulary is not None and set(vocabulary) != {"folder", "size", "texts"}:
        raise ConfigError(f"{path}: [vocabulary] needs folder, size and texts, and nothing else")
    try:
        stages = tuple(build_table(Stage, item, "stages") for item in tables.get("stages", []))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    if not stages or stages[0].grow or not all(stage.grow for stage in stages[1:]):
        raise ConfigError(f"{path}: the first stage begins anew, and all others need grow")
    return Story(folder=folder, stages=stages, vocabulary=vocabulary)


def run_story(
    story: Story, out: Path, on_stage: Callable[[str, int], OnStep | None]
) -> list[dict[str, Any]]:
    """Run all stages; what each began and ended with.

    `on_stage` hears the name and steps of a stage and gives what is called at each of its steps.
    """
    if story.vocabulary is not None:
        make_vocabulary(story.folder, story.vocabulary)
    facts: list[dict[str, Any]] = []
    for number, stage in enumerate(story.stages):
        folder = out / stage.name
        done = read_stage(folder)
        if done is None:
            source = out / story.stages[number - 1].name / "model" if number else None
            done = run_stage(story.folder, stage, folder, source, on_stage)
        facts.append(done)
    return facts


def make_vocabulary(folder: Path, wanted: dict[str, Any]) -> None:
    """Learn the vocabulary of the first stage from its texts, unless it is there."""
    path = folder / wanted["folder"] / "vocab.txt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        tokens = build_vocabulary([folder / text for text in wanted["texts"]], wanted["size"])
        partial = path.with_name("vocab.partial")
        write_vocabulary(tokens, partial)
        partial.replace(path)


def run_stage(
    folder: Path,
    stage: Stage,
    out: Path,
    source: Path | None,
    on_stage: Callable[[str, int], OnStep | None],
) -> dict[str, Any]:
    """Grow, train and write one stage: OUT/start, OUT itself as the run, OUT/model."""
    recipe = read_recipe(folder / stage.recipe)
    facts: dict[str, Any] = {"name": stage.name}
    if source is not None:
        facts["growth"] = grow_once(source, folder / stage.grow, out)
        start = str((out / START).resolve())
        recipe = replace(recipe, train=replace(recipe.train, start=start))
    data = open_data(recipe)
    facts["loss_before"] = group_losses(recipe, data)
    model = train(recipe, out, data, on_stage(stage.name, recipe.train.steps))
    files = find_tokenizer_files(recipe.path(recipe.data.tokenizer))
    # in fp32, so that the next growth starts from what was trained
    save_model(model, out / "model", tokenizer_files=files.values(), dtype=torch.float32)
    rows = read_rows(out)
    facts |= {
        "parameters": num_parameters(model),
        "steps": len(rows),
        "tokens": sum(row["tokens"] for row in rows),
        "seconds": round(sum(row["seconds"] for row in rows), 1),
        "flops": sum(row["flops"] for row in rows),
        "loss_after": {
            name: round(report.loss, 4)
            for name, report in evaluate_groups(model, data, recipe).items()
        },
    }
    write_stage(out, facts)
    return facts


def group_losses(recipe: Recipe, data: TrainingData) -> dict[str, float]:
    """Validation losses of the model that a stage begins with."""
    reports = evaluate_groups(begin_model(recipe).eval(), data, recipe)
    return {name: round(report.loss, 4) for name, report in reports.items()}


def describe_stage(facts: dict[str, Any]) -> list[str]:
    """A stage in lines of text."""
    losses = ", ".join(
        f"{name} {facts['loss_before'][name]:.3f} -> {after:.3f}"
        for name, after in facts["loss_after"].items()
    )
    return [
        *(f"  {line}" for line in facts.get("growth", [])),
        f"{facts['name']}: {facts['parameters']:,} parameters, {facts['steps']:,} steps, "
        f"{facts['tokens']:,} tokens, {facts['seconds']:,.0f} s, {facts['flops']:.2e} operations",
        f"  validation loss: {losses}",
    ]
