"""The report of the benchmark of inheritance: tables as markdown, curves as PNG, all as JSON."""

import os
import platform
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import torch

from engine.config import ModelConfig
from engine.model.initial import num_parameters
from engine.model.transformer import Transformer
from training.bench_inheritance import (
    GOAL_SHARE,
    SHARES,
    Findings,
    Runs,
    summary,
    write_summary,
)
from training.bench_inheritance_arms import SPARSE, Budget
from training.bench_inheritance_curves import Interval, Ratio, falling, interval, loss_at
from training.bench_inheritance_pair import PairFindings, pair_summary
from training.bench_inheritance_runs import Record
from training.bench_inheritance_steps import Shape

ABOUT = {
    "pad": "padding, identity layers, from the source's end",
    "pad-early": "the same from the early source",
    "pad-stack": "padding, stacked layers",
    "fpi-noise": "copies (FPI) with noise, stacked layers",
    "isometric-uneven": "isometric copies, uneven split, identity layers",
    "staged": "padding in two stages, from the early source",
    "pad-moments": "padding, optimiser's moments carried and scaled",
    "pad-fast": "padding, twice the learning rate",
    "pad-taught": "padding, source as teacher at first",
    "deep-pad": "padding, wider only, from a source of two layers",
    "deep-aki": "copies (AKI) with noise, wider only, from the same",
    "continued": "control: the source trained on",
}
DRAWN = ("scratch", "continued", "pad", "pad-early", "staged", "fpi-noise", "deep-aki")


def write_report(findings: Findings, budget: Budget, shape: Shape, out: Path) -> None:
    """Write `inheritance.md`, `inheritance.png` and `inheritance.json` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    draw(findings.runs, out / "inheritance.png")
    write_summary(summary(findings), out / "inheritance.json")
    lines = [
        "# Inheritance: measured",
        "",
        *setting(findings, budget, shape),
        "",
        "![Loss against compute](inheritance.png)",
        *goal_table(findings),
        *cost_table(findings),
        *sparse_table(findings),
        *teaching_table(findings),
    ]
    _write_lines(lines, out / "inheritance.md")


def write_pair_report(findings: PairFindings, budget: Budget, shape: Shape, out: Path) -> None:
    """Write `pair.md`, `pair.png` and `pair.json` into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    draw(findings.runs, out / "pair.png")
    write_summary(pair_summary(findings), out / "pair.json")
    lines = [
        "# Inheritance: the larger pair",
        "",
        *pair_setting(findings, budget, shape),
        "",
        "![Loss against compute](pair.png)",
        *goal_table(findings),
        *cost_table(findings),
    ]
    _write_lines(lines, out / "pair.md")


def _write_lines(lines: Sequence[str], path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    partial.replace(path)


def pair_setting(findings: PairFindings, budget: Budget, shape: Shape) -> list[str]:
    """What was run, in a few lines."""
    tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in findings.rates.items())
    return [
        f"Encoder-decoders of the T5 family on bytes; {_core(budget.small):,} and "
        f"{_core(budget.large):,} parameters without embedding and head. Rows, steps and "
        f"validation as in inheritance.md: {shape.rows} rows of {shape.source_length} + "
        f"{shape.target_length} bytes, AdamW, constant rate after {shape.warmup_steps} steps.",
        "",
        f"Last loss of scratch by rate, first seed: {tried}; chosen {findings.rate:g}. Scratch has "
        f"{budget.scratch_steps} steps, the source {budget.source_steps} at "
        f"{budget.source_rate:g}, padding {budget.grown_steps} at the rate of scratch; the control "
        "has the operations and the rate of padding.",
        "",
        _about_seeds(findings),
    ]


def setting(findings: Findings, budget: Budget, shape: Shape) -> list[str]:
    """What was run, in a few lines."""
    sizes = {"small": _core(budget.small), "large": _core(budget.large)}
    tried = ", ".join(f"{rate}: {loss:.3f}" for rate, loss in findings.rates.items())
    return [
        f"Encoder-decoders of the T5 family on bytes; {sizes['small']:,} and {sizes['large']:,} "
        f"parameters without embedding and head, {_core(SPARSE):,} for the small one with "
        f"{SPARSE.num_experts} experts. A row is a window of text: the encoder reads "
        f"{shape.source_length} bytes, the decoder continues {shape.target_length}; "
        f"{shape.rows} rows a step, AdamW, constant rate after {shape.warmup_steps} steps. "
        f"Validation: {shape.eval_rows * shape.target_length:,} bytes, the same for all.",
        "",
        f"Scratch was tuned first, last loss by rate on the first seed: {tried}; chosen "
        f"{findings.rate:g}. Scratch has {budget.scratch_steps} steps, the source "
        f"{budget.source_steps} (early: {budget.early_steps}) at {budget.source_rate:g}, padding "
        f"{budget.grown_steps}, most others {budget.variant_steps}. What comes of the source has "
        "the rate of scratch, what begins at random that of its size. The control has the "
        "operations of padding.",
        "",
        _about_seeds(findings),
    ]


def _about_seeds(findings: Findings | PairFindings) -> str:
    seeds = len(findings.runs["scratch"])
    mean = f"Mean and 95 % t-interval over {seeds} seeds, paired with scratch of the same seed."
    return (
        f"{mean if seeds > 1 else 'One seed.'} Seconds are processor seconds on one thread "
        f"({platform.machine()}, {os.cpu_count()} cores in all, torch {torch.__version__}); other "
        "work ran on the machine. Operations are those of `training/flops.py`."
    )


def goal_table(findings: Findings | PairFindings) -> list[str]:
    """What was wanted, and what came out."""
    rows = [
        f"| {goal.wanted} | {goal.measured} | {'met' if goal.is_met else 'missed'} |"
        for goal in findings.goals
    ]
    return ["", "## Goals", "", "| goal | measured | |", "|---|---|---|", *rows]


def cost_table(findings: Findings | PairFindings) -> list[str]:
    """Cost of each grown model over that of scratch, at the losses of scratch."""
    scratch = findings.runs["scratch"]
    targets = {share: fmean(loss_at(record, share) for record in scratch) for share in SHARES}
    heads = [f"{share:.0%} ({targets[share]:.3f})" for share in SHARES]
    rows = []
    for name, ratios in findings.ratios.items():
        records = findings.runs[name]
        cells = [ABOUT[name], _ends(records, 0), _ends(records, -1)]
        cells += [ratio_cell(ratios[share], len(records)) for share in SHARES]
        goal = ratios[GOAL_SHARE]
        seconds = "-"
        if goal.free_seconds and goal.charged_seconds:
            seconds = f"{goal.free_seconds.text()} / {goal.charged_seconds.text()}"
        rows.append(f"| {' | '.join([*cells, seconds])} |")
    return [
        "",
        "## Growth",
        "",
        "Operations to a loss over those of scratch: source free / source charged. The losses are "
        "those that scratch has after the share of its budget in the head (mean in brackets).",
        "",
        f"| large model from the small one | step 0 | end | {' | '.join(heads)} "
        f"| seconds, {GOAL_SHARE:.0%} |",
        f"|{'---|' * (len(SHARES) + 4)}",
        f"| scratch | {_ends(scratch, 0)} | {_ends(scratch, -1)} |{' 1 |' * (len(SHARES) + 1)}",
        *rows,
        "",
        f"Padding ends {findings.over_control.text(3)} nat below the control at equal operations.",
    ]


def sparse_table(findings: Findings) -> list[str]:
    """Mixtures of experts at equal extra compute."""
    runs = findings.runs
    return [
        "",
        "## Dense to mixture of experts",
        "",
        "Upcycled and dense begin with the source's end; last losses after equal operations.",
        "",
        "| model | loss | upcycled is lower by |",
        "|---|---|---|",
        f"| upcycled | {_ends(runs['upcycled'], -1)} | |",
        f"| dense continued | {_continued(findings).text(3)} | {findings.over_dense.text(3)} |",
        f"| MoE from scratch | {_ends(runs['sparse-scratch'], -1)} "
        f"| {findings.over_sparse_scratch.text(3)} |",
    ]


def teaching_table(findings: Findings) -> list[str]:
    """Distillation where text is little."""
    runs = findings.runs
    best = {
        name: interval([min(p.loss for p in falling(r.points)) for r in runs[f"little-{name}"]])
        for name in ("alone", "taught")
    }
    steps = findings.teaching_steps
    return [
        "",
        "## Distillation with little text",
        "",
        "The large model on 20 kB of text, alone and taught by the control's end, which has read "
        "all. The teacher's share of the loss falls from 1 to 1/2; steps do not charge it.",
        "",
        "| run | best loss |",
        "|---|---|",
        f"| alone | {best['alone'].text(3)} |",
        f"| taught | {best['taught'].text(3)} |",
        "",
        f"Steps to the lone run's best: {steps.text() if steps else 'not reached'} of its own; "
        f"best loss lower by {findings.teaching_nats.text(3)} nat.",
    ]


def ratio_cell(ratio: Ratio, seeds: int) -> str:
    """Both ratios; or how many seeds got there, or that the loss asks nothing of the arm."""
    if not ratio.is_fair:
        return "begins below"
    if ratio.free is None or ratio.charged is None:
        return f"reached by {ratio.reached} of {seeds}"
    return f"{ratio.free.text()} / {ratio.charged.text()}"


def draw(runs: Runs, path: Path) -> None:
    """Loss over operations and over seconds, the source charged; one line per seed."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.8), layout="constrained")
    FigureCanvasAgg(figure)
    charged, free = figure.subplots(1, 2, sharey=True)
    low = min(min(p.loss for p in r.points) for r in runs["scratch"])
    for axes, title in ((charged, "source charged"), (free, "source free")):
        for number, name in enumerate(n for n in DRAWN if n in runs):
            for record in runs[name]:
                offset = record.charged[0] if axes is charged else 0.0
                curve = falling(record.points)
                axes.plot(
                    [(point.flops + offset) / 1e12 for point in curve],
                    [point.loss for point in curve],
                    color=f"C{number}",
                    alpha=0.8,
                    label=name if record is runs[name][0] else None,
                )
        axes.set_ylim(low - 0.05, low + 0.7)
        axes.set_xlabel(f"training, TFLOP ({title})")
        axes.grid(alpha=0.3)
    charged.set_ylabel("validation loss (nats per byte)")
    charged.legend(loc="upper right")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def _core(config: ModelConfig) -> int:
    with torch.device("meta"):
        whole = num_parameters(Transformer(config))
    return whole - 2 * config.vocab_size * config.d_model


def _ends(records: Sequence[Record], index: int) -> str:
    curves = [falling(record.points) for record in records]
    return f"{fmean(curve[index].loss for curve in curves):.3f}"


def _continued(findings: Findings) -> Interval:
    gains = findings.over_dense.values
    ends = [falling(record.points)[-1].loss for record in findings.runs["upcycled"]]
    return interval([end + gain for end, gain in zip(ends, gains, strict=True)])
