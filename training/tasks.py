"""Tasks as data: a TOML file that says how a row becomes a text, what may follow and how it counts.

Source: the ready ones in `task_files` follow CPM-2 (arXiv:2106.10715) s4 and its fine-tuning code.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

from engine.errors import ConfigError
from training.recipe import read_tables

Kind = Literal["choice", "generate", "rank"]
Metric = Literal["accuracy", "exact_match", "bleu", "rouge_l", "distinct", "mrr", "ndcg"]
By = Literal["total", "mean"]
Loss = Literal["words", "labels"]
KINDS: tuple[Kind, ...] = get_args(Kind)
METRICS: dict[Kind, tuple[Metric, ...]] = {
    "choice": ("accuracy",),
    "generate": ("exact_match", "bleu", "rouge_l", "distinct"),
    "rank": ("mrr", "ndcg"),
}
MIDDLE = "middle"  # the field of a template where vectors of the middle go
LABEL = "label"  # where the words of a label go, in a task with a continuation
FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")
FOLDER = Path(__file__).parent / "task_files"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListFormat:
    """How a column that holds a list is written: each item by `item`, and what is between them.

    `item` may hold {item}, or {0} and {1} of an item that is a list, and {number}, taken from
    `numbers`.
    """

    item: str = "{item}"
    join: str = ""
    numbers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """Where the answer of a row is.

    With `choices_from` (a column that holds a list) the labels are its places, told by the words
    of the list's `numbers` or, without such, by the items themselves; the answer is a place, or
    the item itself. `skip` characters at its start are left out.
    """

    column: str
    choices_from: str | None = None
    skip: int = 0
    gains: str | None = None  # of a ranking: the column of gains, where `column` holds the texts
    negatives: str | None = None  # of a ranking of pairs: the column of the worse text


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task. `labels` maps a value of the answer's column to the words that stand for it.

    Words of labels are scored as what follows the template. With a `continuation`, another
    template, that is what is scored, and {label} in either of the two stands for the words: which
    makes the text likeliest. Of a text that has nothing before it a decoder-only model scores all
    but the first token. With `candidates` each row is asked for so many labels only: the right one
    and others drawn by `seed`.
    """

    name: str
    kind: Kind
    template: str
    metric: Metric
    answer: Answer
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    lists: Mapping[str, ListFormat] = field(default_factory=dict)
    by: By = "total"  # how words of several tokens compare: sums of log-probabilities, or means
    loss: Loss = "words"
    continuation: str | None = None
    candidates: int = 0
    seed: int = 0
    cut: str | None = None  # the column that is shortened where a text is too long
    max_input_tokens: int = 512
    max_tokens: int = 64
    temperature: float = 1.0  # of a ranking's loss
    tokenize: str = "13a"  # sacrebleu's; zh for Chinese
    cutoff: int = 10  # of NDCG
    slots: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("kind", self.kind, KINDS),
            ("metric", self.metric, METRICS.get(self.kind, ())),
            ("by", self.by, get_args(By)),
            ("loss", self.loss, get_args(Loss)),
        ):
            if value not in allowed:
                raise ConfigError(f"{name} is {value!r}; allowed: {', '.join(allowed)}")
        for name in ("max_input_tokens", "max_tokens", "cutoff"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)!r}; it must be 1 or more")
        if self.temperature <= 0:
            raise ConfigError(f"temperature is {self.temperature}; it must be above 0")
        self._check_answers()
        self._check_continuation()
        if self.template.count("{middle}") > 1:
            raise ConfigError("the template has {middle} more than once")
        if self.cut is not None and f"{{{self.cut}}}" not in self.template + (
            self.continuation or ""
        ):
            raise ConfigError(f"cut is {self.cut!r}; expected a field of the template")
        if "{middle}" in self.template and not self.mark:
            raise ConfigError("before {middle} the template needs a text that marks the place")

    def _check_answers(self) -> None:
        if self.kind == "generate" and self.labels:
            raise ConfigError("labels are for a choice; a generate task has none")
        if self.kind == "choice" and bool(self.labels) == bool(self.answer.choices_from):
            raise ConfigError("a choice needs [labels] or answer.choices_from, one of them")
        if self.kind == "choice" and len(self.labels) == 1:
            raise ConfigError("a choice among one label is always right; give two labels or more")
        if self.kind == "rank":
            if len(self.labels) != 1:
                raise ConfigError("a ranking needs one label, whose words score a text")
            if (self.answer.gains is None) == (self.answer.negatives is None):
                raise ConfigError("a ranking needs answer.gains or answer.negatives, one of them")
        if empty := [label for label, words in self.labels.items() if not words or "" in words]:
            raise ConfigError(f"label {empty[0]!r} has no words, or an empty one")

    def _check_continuation(self) -> None:
        if type(self.candidates) is not int or self.candidates < 0 or self.candidates == 1:
            raise ConfigError(f"candidates is {self.candidates!r}; it must be 0 (all) or 2 or more")
        if type(self.seed) is not int or self.seed < 0:
            raise ConfigError(f"seed is {self.seed!r}; it must be a whole number, 0 or more")
        if self.kind != "choice" and (self.continuation is not None or self.candidates):
            raise ConfigError("continuation and candidates are for a choice")
        if self.continuation is None:
            return
        if "{label}" not in self.template + self.continuation:
            raise ConfigError("with a continuation, it or the template needs {label}")
        if "{middle}" in self.continuation or not self.continuation:
            raise ConfigError("continuation is empty or has {middle}; that is for the template")

    @property
    def mark(self) -> str:
        """The character before {middle}, after which the vectors of the middle go."""
        before, found, _ = self.template.partition("{middle}")
        before = before[-1:] if found else ""
        return "" if before in ("}", " ") else before

    def columns(self) -> tuple[str, ...]:
        """The columns that a row needs, in the order of the template."""
        text, given = self.template, {MIDDLE}
        if self.continuation is not None:
            text, given = text + self.continuation, {MIDDLE, LABEL}
        found = [name for name in FIELD.findall(text) if name not in given]
        answer = self.answer
        wanted = [*found, answer.column, answer.choices_from, answer.gains, answer.negatives]
        if self.kind == "rank":  # the texts that are ranked are written as {text}
            wanted = [name for name in wanted if name != "text"]
        return tuple(dict.fromkeys(name for name in wanted if name is not None))


def ready_tasks() -> list[str]:
    """Names of the tasks that come with infmoe."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def open_task(name: str) -> Task:
    """A task by its name among the ready ones, or by the path of its file.

    Raises ConfigError if there is none, or the file is no task.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = FOLDER / f"{name}.toml"
        if name not in ready_tasks():
            ready = ", ".join(ready_tasks())
            raise ConfigError(f"task {name!r} is not known; give a .toml file or one of: {ready}")
    return parse_task(path, read_tables(path))


def parse_task(path: Path, values: dict[str, Any]) -> Task:
    """Check the tables of a task file. Raises ConfigError that names file and key."""
    try:
        tables = {
            "answer": _build(Answer, _table(values, "answer"), "answer"),
            "labels": {key: _words(key, words) for key, words in _table(values, "labels").items()},
            "lists": {
                key: _build(ListFormat, _lists(item, key), f"lists.{key}")
                for key, item in _table(values, "lists").items()
            },
            "slots": _slots(_table(values, "slots")),
        }
        task: Task = _build(Task, {"name": path.stem} | values | tables, "the file")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return task


def _table(values: dict[str, Any], name: str) -> dict[str, Any]:
    table = values.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{name} is {table!r}; expected a table")
    return table


def _words(label: str, words: object) -> tuple[str, ...]:
    listed = [words] if isinstance(words, str) else words
    if not isinstance(listed, list) or not all(isinstance(word, str) for word in listed):
        raise ConfigError(f"labels: {label} is {words!r}; expected a word or a list of words")
    return tuple(listed)


def _lists(values: object, name: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ConfigError(f"lists.{name} is {values!r}; expected a table")
    numbers = values.get("numbers", "")
    if not isinstance(numbers, str | list) or not all(isinstance(one, str) for one in numbers):
        raise ConfigError(
            f"lists.{name}: numbers is {numbers!r}; expected a text or a list of texts"
        )
    return values | {"numbers": tuple(numbers)}  # a text gives its characters


def _slots(values: dict[str, Any]) -> dict[str, int]:
    for name, value in values.items():
        if name not in ("front", "middle", "back") or type(value) is not int or value < 0:
            raise ConfigError(f"slots: {name} = {value!r}; expected front, middle, back, numbers")
    return values


def _build(kind: Any, values: dict[str, Any], where: str) -> Any:
    """A dataclass of a table; unknown, missing and wrongly typed keys are errors."""
    known = {item.name: item for item in fields(kind)}
    if unknown := sorted(values.keys() - known.keys()):
        raise ConfigError(f"{where}: unknown key {unknown[0]}; known: {', '.join(known)}")
    for name, value in values.items():
        if "str" in str(known[name].type) and not isinstance(value, str | tuple | dict):
            raise ConfigError(f"{where}: {name} is {value!r}; expected a text")
    try:
        return kind(**values)
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from error
