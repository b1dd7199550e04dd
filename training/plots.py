"""Curves of a run as PNG."""

from pathlib import Path
from typing import Any


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
        axes.legend()
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
