"""Curves of a run, or of several, as PNG."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from training.run_compare import RunCurve


def plot_losses(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw training and validation loss over steps from the rows of `metrics.jsonl`."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    train = [(row["step"], row["loss"]) for row in rows if "loss" in row]
    valid = [
        (row["step"], row["valid_loss"], row["unigram_loss"]) for row in rows if "valid_loss" in row
    ]
    if train:
        axes.plot(
            *zip(*train, strict=True), color="tab:blue", alpha=0.5, label="training, all targets"
        )
    if valid:
        steps, losses, unigram = zip(*valid, strict=True)
        axes.plot(steps, losses, "o-", color="tab:orange", label="validation, span tokens")
        axes.plot(steps, unigram, "--", color="tab:gray", label="unigram baseline")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    if train or valid:
        axes.legend(loc="upper right")  # to look for the best place may take seconds
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)


def plot_runs(curves: Sequence[RunCurve], path: Path) -> None:
    """Draw validation loss against tokens, seconds and operations, one colour a run.

    Operations with teachers and earlier runs charged; dashed without, where that differs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 3, sharey=True)
    for number, curve in enumerate(curves):
        style = {"color": f"C{number % 10}", "label": curve.name}
        for axes, spent in zip(
            panels, (curve.tokens, curve.seconds, curve.charged_flops), strict=True
        ):
            axes.plot(spent, curve.losses, "o-", markersize=3, **style)
        if curve.flops != curve.charged_flops:
            panels[2].plot(curve.flops, curve.losses, "--", color=style["color"], alpha=0.6)
    for axes, label in zip(panels, ("tokens", "seconds", "floating-point operations"), strict=True):
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend(loc="upper right")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
