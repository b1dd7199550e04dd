"""Plots of how a task was done, as PNG."""

from pathlib import Path

from engine.errors import ConfigError
from training.task_eval import TaskReport

MOST_WRITTEN = 20  # labels of which each cell still has room for its number


def plot_confusion(report: TaskReport, path: Path) -> None:
    """Draw which labels are taken for which: shares of the rows that have a label, and counts.

    A label that is not ASCII, for which the font may have no glyphs, is told by its place among
    the labels of the report, from 1.

    Raises ConfigError if the task chooses no labels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not report.confusion:
        raise ConfigError(f"task {report.task} chooses no labels, so there is nothing to confuse")
    labels = [one.label for one in report.labels]
    names = [name if name.isascii() else f"#{i}" for i, name in enumerate(labels, 1)]
    shares = [[n / max(sum(row), 1) for n in row] for row in report.confusion]
    side = min(3.5 + 0.4 * len(names), 14.0)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    figure.colorbar(image, ax=axes, label="share of the rows with the label")
    places = range(len(names))
    turned = 90 if len(names) > 8 else 0
    axes.set_xticks(places, names, rotation=turned)
    axes.set_yticks(places, names)
    axes.set_xlabel("answer")
    axes.set_ylabel("label")
    axes.set_title(f"{report.metric} {report.score.value:.4f}, {report.rows:,} rows")
    for i, row in enumerate(report.confusion if len(names) <= MOST_WRITTEN else ()):
        for j, count in enumerate(row):
            colour = "white" if shares[i][j] > 0.5 else "black"
            axes.text(j, i, f"{count}", ha="center", va="center", color=colour)
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    partial.replace(path)
