"""How well a model, with or without a prompt, does a task."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from training.metrics_text import (
    Interval,
    LabelScore,
    bleu,
    distinct,
    label_table,
    mean_interval,
    ndcg,
    reciprocal_rank,
    rouge_l,
)
from training.task_examples import Example
from training.task_readers import Ids
from training.tasks import Task
from training.tune_model import batches

OnRows = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class TaskReport:
    """The score of a task, the share of each label, and the answer to each row.

    Rows and columns of `confusion` are in the order of `labels`.
    """

    task: str
    metric: str
    score: Interval
    rows: int
    labels: tuple[LabelScore, ...]
    answers: tuple[str, ...]
    confusion: tuple[tuple[int, ...], ...] = ()  # of a choice: rows by label and by answer

    def summary(self) -> list[str]:
        """Lines for people."""
        lines = [f"{self.task}: {self.metric} {self.score}, {self.rows:,} rows"]
        if self.labels:
            width = max(5, *(len(one.label) for one in self.labels))
            lines.append(f"{'label':{width}}  rows  given  precision  recall  F1")
        for one in self.labels:
            lines.append(
                f"{one.label:{width}}  {one.rows:4}  {one.given:5}  {one.precision:9.3f}  "
                f"{one.recall:6.3f}  {one.f1:.3f}"
            )
        return lines

    def as_score(self) -> dict[str, Any]:
        """What an adapter's file tells of it."""
        interval = {key: value for key, value in self.score._asdict().items() if value is not None}
        return {"metric": self.metric, "rows": self.rows} | {
            key: round(value, 4) for key, value in interval.items()
        }

    def as_json(self) -> dict[str, Any]:
        """All but the answers, in JSON's types."""
        values = asdict(self)
        del values["answers"]
        return values | {
            "score": self.score._asdict(),
            "labels": [label._asdict() for label in self.labels],
        }


class Asked(Protocol):
    """What is asked: a `Scorer`, or a server."""

    def label_scores(self, examples: Sequence[Example], task: Task) -> Sequence[Tensor]: ...

    def write(self, sources: Sequence[Ids], max_tokens: int) -> Sequence[str]: ...


class Replies(NamedTuple):
    """What a model said to each row: a text, or a score for each label or each ranked text."""

    texts: list[str]
    scores: list[list[float]]


@torch.no_grad()
def ask(
    scorer: Asked,
    examples: Sequence[Example],
    task: Task,
    rows: int = 16,
    on_rows: OnRows = lambda _done, _all: None,
) -> Replies:
    """Ask all examples, so many texts at once."""
    replies = Replies([""] * len(examples), [[] for _ in examples])
    done = 0
    for numbers in batches(examples, rows):
        group = [examples[number] for number in numbers]
        if task.kind == "generate":
            texts = scorer.write([example.sources[0] for example in group], task.max_tokens)
            for number, text in zip(numbers, texts, strict=True):
                replies.texts[number] = text.strip()
        else:
            for number, score_L in zip(numbers, scorer.label_scores(group, task), strict=True):
                replies.scores[number] = score_L.tolist()
        done += len(group)
        on_rows(done, len(examples))
    return replies


def judge(task: Task, examples: Sequence[Example], replies: Replies) -> TaskReport:
    """Score what was said."""
    answers, scores = replies.texts, replies.scores
    table: tuple[LabelScore, ...] = ()
    confusion: tuple[tuple[int, ...], ...] = ()
    if task.kind != "generate":
        best = [max(range(len(found)), key=found.__getitem__) for found in scores]
        answers = [str(i) for i in best]
    if task.kind == "choice":
        answers = [example.labels[i] for example, i in zip(examples, best, strict=True)]
        right = [example.labels[example.answer] for example in examples]
        table = tuple(label_table(answers, right))
        counts = Counter(zip(right, answers, strict=True))
        confusion = tuple(tuple(counts[a.label, b.label] for b in table) for a in table)
    score = _score(task, examples, answers, scores)
    return TaskReport(
        task.name, task.metric, score, len(examples), table, tuple(answers), confusion
    )


def evaluate_task(
    scorer: Asked,
    examples: Sequence[Example],
    task: Task,
    rows: int = 16,
    on_rows: OnRows = lambda _done, _all: None,
) -> TaskReport:
    """Ask all examples, so many texts at once, and score the answers."""
    return judge(task, examples, ask(scorer, examples, task, rows, on_rows))


def _score(
    task: Task, examples: Sequence[Example], answers: list[str], scores: list[list[float]]
) -> Interval:
    references = [example.reference for example in examples]
    if task.metric == "bleu":
        return bleu(answers, references, task.tokenize)
    if task.metric == "distinct":
        return distinct(answers)
    ranked = zip(scores, examples, strict=True)
    rows: dict[str, Callable[[], list[float]]] = {
        "accuracy": lambda: [
            float(answer == example.labels[example.answer])
            for answer, example in zip(answers, examples, strict=True)
        ],
        "exact_match": lambda: [
            float(answer == reference)
            for answer, reference in zip(answers, references, strict=True)
        ],
        "rouge_l": lambda: rouge_l(answers, references),
        "mrr": lambda: [reciprocal_rank(found, example.gains) for found, example in ranked],
        "ndcg": lambda: [ndcg(found, example.gains, task.cutoff) for found, example in ranked],
    }
    return mean_interval(rows[task.metric]())
