"""Progress of long work: bars on a terminal, plain lines in a log."""

import sys
from time import monotonic
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

LOG_EVERY_S = 30.0


def describe(row: dict[str, Any]) -> str:
    """One line of a step's metrics."""
    text = f"loss {row['loss']:.3f} rate {row['rate']:.2e}"
    if "valid_loss" in row:
        text += f" | fill loss {row['valid_loss']:.3f} against unigram {row['unigram_loss']:.3f}"
        text += f", accuracy {row['valid_accuracy']:.1%}"
    return text


class _Bars:
    """A rich progress display on stderr, hidden where stderr is no terminal."""

    def __init__(self, *columns: str) -> None:
        console = Console(file=sys.stderr)
        self.is_log = not console.is_terminal
        parts = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        extra = [TextColumn(column) for column in columns]
        self.progress = Progress(
            *parts, *extra, TimeRemainingColumn(), console=console, disable=self.is_log
        )
        self.console = console
        self._last_line = 0.0

    def __enter__(self) -> "Any":
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def log(self, text: str, *, now: bool = False) -> None:
        """A plain line, at most every LOG_EVERY_S unless `now`."""
        if now or (self.is_log and monotonic() - self._last_line >= LOG_EVERY_S):
            self.console.print(text, highlight=False, soft_wrap=True)
            self._last_line = monotonic()


class PrepareProgress(_Bars):
    """Progress of tokenizing texts, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self._tasks: dict[str, TaskID] = {}

    def report(self, name: str, done: int, size: int) -> None:
        """Bytes done of one text."""
        if name not in self._tasks:
            self._tasks[name] = self.progress.add_task(f"tokenizing {name}", total=size)
        self.progress.update(self._tasks[name], completed=done)
        self.log(f"tokenizing {name}: {done / max(size, 1):.0%}")


class TrainProgress(_Bars):
    """Progress of a training run: loss, tokens per second, time left."""

    def __init__(self, steps: int) -> None:
        super().__init__("{task.fields[status]}")
        self._steps = steps
        self._task = self.progress.add_task("training", total=steps, status="")

    def report(self, row: dict[str, Any]) -> None:
        """Metrics of a step, as the loop gives them."""
        rate = row["tokens"] / max(row["seconds"], 1e-9)
        status = f"loss {row['loss']:.3f} {rate:,.0f} tok/s"
        self.progress.update(self._task, completed=row["step"], status=status)
        line = f"step {row['step']}/{self._steps} {describe(row)}"
        left_s = (self._steps - row["step"]) * row["seconds"]
        self.log(f"{line} {rate:,.0f} tok/s, {left_s / 60:.0f} min left", now="valid_loss" in row)
