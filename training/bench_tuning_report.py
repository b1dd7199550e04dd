"""The report of the benchmark of prompt tuning: tables as markdown, curves as PNG, all as JSON."""

import json
import os
import platform
from pathlib import Path
from statistics import fmean

import torch

from training.bench_tuning_arms import PLACES, Budget
from training.bench_tuning_findings import MAIN, Findings, points, summary
from training.bench_tuning_runs import Record
from training.metrics_text import Interval

ABOUT = {
    "untuned": "the model as it is",
    "prompt": "prompt, model frozen",
    "ensemble-mean": "ensemble of its prompts, mean of scores",
    "ensemble-majority": "the same, majority",
    "full": "full fine-tuning",
    "joint": "the prompt, then all weights with it",
}
MASKS = {
    "front": "all seen",
    "prompt-blind": "prompt cannot see text",
    "text-blind": "text cannot see prompt",
}


def write_report(findings: Findings, budget: Budget, model: str, out: Path) -> None:
    """Write `tuning.md`, `tuning.png` and `tuning.json` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    draw(findings, out / "tuning.png")
    lines = [
        "# Prompt tuning: measured",
        "",
        *setting(findings, budget, model),
        "",
        "![Scores against processor time, and ablations](tuning.png)",
        *goal_table(findings),
        *main_table(findings),
        *cost_table(findings, budget),
        *few_table(findings, budget),
        *ablation_tables(findings, budget),
    ]
    texts = {
        "tuning.json": json.dumps(summary(findings), indent=2),
        "tuning.md": "\n".join(lines),
    }
    for name, text in texts.items():
        partial = out / f"{name}.partial"
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(out / name)


def setting(findings: Findings, budget: Budget, model: str) -> list[str]:
    """What was run, in a few lines."""
    train, dev, test = findings.num_rows
    seeds = len(findings.runs["prompt"])
    return [
        f"Chinese reviews, good or bad: {train:,} rows to learn from, {dev:,} to choose the best "
        f"weights by, {test:,} to test. Model: {model}, {findings.num_parameters:,} parameters, in "
        f"fp32. {budget.vectors} vectors, {budget.batch} rows a step, Adafactor at 0.3 for prompts "
        "and at 1e-3 of each weight's RMS for weights. No early stopping: all steps are run, and "
        "the weights that did best on the dev rows are scored.",
        "",
        f"Main arms and few rows: {seeds} seeds; ablations: one. Intervals are 95 % bootstraps "
        "over seeds and test rows together. Times are processor seconds on one thread "
        f"({platform.machine()}, {os.cpu_count()} cores in all, torch {torch.__version__}); other "
        "work ran on the machine.",
    ]


def goal_table(findings: Findings) -> list[str]:
    """What was wanted, and what came out."""
    rows = [
        f"| {goal.wanted} | {goal.measured} | {'met' if goal.is_met else 'missed'} |"
        for goal in findings.goals
    ]
    return ["", "## Goals", "", "| goal | measured | |", "|---|---|---|", *rows]


def main_table(findings: Findings) -> list[str]:
    """Score, cost and size of each way of tuning."""
    rows = []
    for name in MAIN:
        found = findings.runs.get(name, [])
        behind = points(findings.gaps[name]) if name in findings.gaps else "-"
        cells = [ABOUT[name], share(findings.scores[name]), behind, *_sizes(findings, name, found)]
        rows.append(f"| {' | '.join(cells)} |")
    return [
        "",
        "## Ways of tuning (as CPM-2's table 4)",
        "",
        "Steps are the best one of each seed, of those that were run. Memory is the peak of a run "
        "on this model with Adafactor; the joint run needs that of full fine-tuning, and its steps "
        "come after those of the prompt.",
        "",
        "| | accuracy | behind full, points | trained | memory, MiB | s a step | best steps "
        "| s to the best |",
        "|---|---|---|---|---|---|---|---|",
        *rows,
    ]


def _sizes(findings: Findings, name: str, found: list[Record]) -> list[str]:
    if not found:
        prompts = findings.runs["prompt"]
        is_ensemble = name.startswith("ensemble")
        trained = f"{sum(one.num_trained for one in prompts):,}" if is_ensemble else "0"
        return [trained, "-", "-", "-", "-"]
    cost = findings.costs.get(f"model {name} adafactor")
    best = ", ".join(str(one.best_step) for one in found)
    return [
        f"{found[0].num_trained:,}",
        f"{cost.peak_bytes / 2**20:.0f}" if cost else "-",
        f"{fmean(one.step_s for one in found):.3f}",
        f"{best} of {found[0].curve[-1][0]}",
        f"{fmean(seconds_to_best(one) for one in found):.0f}",
    ]


def seconds_to_best(record: Record) -> float:
    """Processor seconds of the steps up to the best one."""
    return next(seconds for step, _, seconds in record.curve if step == record.best_step)


def cost_table(findings: Findings, budget: Budget) -> list[str]:
    """Memory of a prompt beside that of all weights."""
    rows = []
    for name, prompt in findings.costs.items():
        place, kind, optimizer = name.split()
        if kind != "prompt":
            continue
        full = findings.costs[f"{place} full {optimizer}"]
        what = "this model" if place == "model" else "random, dense, wider"
        rows.append(
            f"| {what} | {optimizer} | {prompt.peak_bytes / 2**20:.0f} "
            f"| {full.peak_bytes / 2**20:.0f} | {prompt.peak_bytes / full.peak_bytes:.2f} "
            f"| {prompt.step_s / full.step_s:.2f} |"
        )
    width, layers = budget.wide
    return [
        "",
        "## Memory",
        "",
        "Peak of resident memory above that of the libraries, each in a process of its own: "
        "weights, the copy of the best ones, gradients, optimiser, activations. The wider model "
        f"has a width of {width} and {layers} layers a stack, and half of the rows a step.",
        "",
        "| model | optimiser | prompt, MiB | full, MiB | memory, prompt over full "
        "| time of a step, the same |",
        "|---|---|---|---|---|---|",
        *rows,
    ]


def few_table(findings: Findings, budget: Budget) -> list[str]:
    """Few rows, with and without a pre-trained prompt."""
    pairs = findings.runs["pairs"][0]
    rows = [
        f"| {about} | {share(findings.scores[name])} |"
        for name, about in (
            ("few", "prompt from labels and frequent tokens"),
            ("few-pretrained", "prompt pre-trained on pairs of sentences"),
        )
    ]
    return [
        "",
        "## Few rows (as PPT)",
        "",
        f"{budget.few_rows} rows to learn from and as many to choose by, others for each seed, "
        f"{budget.few_steps} steps. The prompt was pre-trained once, {budget.pair_steps} steps on "
        f"{budget.pairs:,} pairs; it tells {pairs.curve[-1][1]:.3f} of other pairs right (a third "
        "is chance).",
        "",
        "| | accuracy |",
        "|---|---|",
        *rows,
        "",
        f"Pre-training is worth {points(findings.gaps['few'])} points.",
    ]


def ablation_tables(findings: Findings, budget: Budget) -> list[str]:
    """Positions and masks."""

    def line(name: str, about: str) -> str:
        behind = points(findings.gaps[name]) if name in findings.gaps else "-"
        return f"| {about} | {share(findings.scores[name])} | {behind} |"

    heads = ["| accuracy | behind the first, points |", "|---|---|---|"]
    return [
        "",
        "## Positions (as CPM-2's table 5)",
        "",
        f"{budget.vectors} vectors in all, {budget.ablation_steps} steps, one seed: intervals are "
        "over rows alone. Middle is between the text and the question after it, back behind both.",
        "",
        f"| place {heads[0]}",
        heads[1],
        *(line(name, name) for name in PLACES),
        "",
        "## Masks (as CPM-2's table 6)",
        "",
        "Attention of the encoder; vectors in front; the decoder sees all.",
        "",
        f"| attention {heads[0]}",
        heads[1],
        *(line(name, about) for name, about in MASKS.items()),
    ]


def share(found: Interval) -> str:
    """A score with its interval."""
    if found.low is None or found.high is None:
        return f"{found.value:.3f}"
    return f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"


def draw(findings: Findings, path: Path) -> None:
    """Dev scores over processor seconds, one line per seed; test scores of the ablations."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    curves, bars = figure.subplots(1, 2)
    for number, name in enumerate(("prompt", "full", "joint")):
        for record in findings.runs[name]:
            curves.plot(
                [seconds for _, _, seconds in record.curve],
                [score for _, score, _ in record.curve],
                "o-",
                markersize=3,
                color=f"C{number}",
                label=ABOUT[name] if record is findings.runs[name][0] else None,
            )
    curves.set_xlabel("processor seconds of its own steps")
    curves.set_ylabel("accuracy, dev rows")
    curves.grid(alpha=0.3)
    curves.legend(loc="lower right")
    names = [*reversed(MASKS), *reversed(PLACES[1:])]
    found = [findings.scores[name] for name in names]
    low = [one.value - (one.low or 0.0) for one in found]
    high = [(one.high or 1.0) - one.value for one in found]
    values = [one.value for one in found]
    bars.errorbar(values, range(len(names)), xerr=[low, high], fmt="o", color="C0", capsize=3)
    bars.axvline(findings.scores["front"].value, color="gray", linestyle="--")
    bars.set_yticks(range(len(names)), names)
    bars.set_xlabel("accuracy, test rows")
    bars.grid(alpha=0.3, axis="x")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
