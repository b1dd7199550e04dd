"""From rows to token ids: what the encoder reads, what may follow, and which of it is right.

All is checked before a model is loaded: a row that cannot be used is an error that names its line.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine.adapters import Slots
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.tokenizer import Tokenizer
from training.task_rows import Row, read_rows
from training.tasks import FIELD, MIDDLE, ListFormat, Task

Ids = tuple[int, ...]
MOST_CHARS = 24  # of a token, in any vocabulary


@dataclass(frozen=True, slots=True)
class Example:
    """A row that is ready to be asked.

    A choice has one source, the words of each label, and the number of the right one; a ranking a
    source for each text and its gain; what is generated a target, which ends in what closes it.
    """

    line: int
    sources: tuple[Ids, ...]
    words: tuple[tuple[Ids, ...], ...] = ()
    labels: tuple[str, ...] = ()
    answer: int = 0
    gains: tuple[float, ...] = ()
    target: Ids = ()
    reference: str = ""


def read_examples(
    path: Path, task: Task, tokenizer: Tokenizer, config: ModelConfig, num_vectors: int = 0
) -> list[Example]:
    """Read a file of rows as a task tells, beside so many vectors of a prompt.

    Raises ValueError, naming file and line, for a row that cannot be used.
    """
    limit = config.max_prompt_tokens - num_vectors
    return read_with(_Tokens(tokenizer, config), limit, path, task)


class Reader(Protocol):
    """Ids of texts, as the encoder and the decoder are to have them."""

    def close(self, text: str) -> list[int]:
        """Those of what the encoder reads, with what closes it."""
        ...

    def spell(self, text: str) -> list[int]:
        """Those of a part of a text. Raises ValueError if there are none for some of it."""
        ...

    @property
    def closing(self) -> Ids:
        """What ends an answer; nothing where nobody is trained."""
        ...


def read_with(reader: Reader, limit: int, path: Path, task: Task) -> list[Example]:
    """Read a file of rows by means of a reader, texts within a limit of tokens.

    Raises ValueError, naming file and line, for a row that cannot be used.
    """
    maker = _Maker(task, reader, limit)
    examples = []
    for row in read_rows(path, task.columns()):
        try:
            examples.append(maker.make(row))
        except ValueError as error:
            raise ValueError(f"{path}, line {row.line}: {error}") from error
    return examples


def make_slots(
    task: Task, tokenizer: Tokenizer, front: int | None, middle: int | None, back: int | None
) -> Slots:
    """How many vectors go where: as asked, otherwise as the task says, otherwise 100 in front.

    Raises ConfigError if there would be none, or some in the middle of a text that has no place.
    """
    given = {"front": front, "middle": middle, "back": back}
    asked = {name: count for name, count in given.items() if count is not None}
    counts = asked or dict(task.slots) or {"front": 100}
    if not any(counts.values()):
        raise ConfigError("a prompt needs at least one vector: give --front, --middle or --back")
    if not counts.get("middle"):
        return Slots(**counts)
    if not task.mark:
        raise ConfigError(
            f"task {task.name} has no {{middle}} in its template, so no vectors can go there"
        )
    ids = tokenizer.encode(task.mark)
    if not ids or ids[-1] in tokenizer.control_ids:
        raise ConfigError(f"the tokenizer cannot spell {task.mark!r}, which marks the middle")
    return Slots(**counts, middle_mark=ids[-1])


def fill_template(task: Task, values: Mapping[str, Any]) -> str:
    """The text of a row: fields by their columns, lists as the task says."""

    def fill(name: str) -> str:
        if name == MIDDLE:
            return ""
        value = values[name]
        if isinstance(value, list | tuple):
            return format_list(value, task.lists.get(name, ListFormat(join=" ")))
        return str(value)

    return FIELD.sub(lambda match: fill(match[1]), task.template)


def format_list(items: list[Any] | tuple[Any, ...], how: ListFormat) -> str:
    """Write a list. Raises ValueError if there are more items than numbers."""
    if how.numbers and len(items) > len(how.numbers):
        raise ValueError(f"a list has {len(items)} items; there are {len(how.numbers)} numbers")
    written = []
    for index, item in enumerate(items):
        parts = item if isinstance(item, list | tuple) else ()
        known = {str(place): str(part) for place, part in enumerate(parts)}
        known |= {"item": str(item), "number": how.numbers[index] if how.numbers else ""}
        text = how.item
        for name, value in known.items():
            text = text.replace(f"{{{name}}}", value, 1)
        written.append(text)
    return how.join.join(written)


def encoder_ids(text: str, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """Ids of a text with what closes it, as the server makes them of a prompt."""
    ids = tokenizer.encode(text)
    if config.continuation_sentinel is None:
        return [*ids, *config.eos_token_ids[:1]]
    return [*ids, tokenizer.sentinel_id(config.continuation_sentinel)]


def decoder_start(tokenizer: Tokenizer, config: ModelConfig) -> Ids:
    """What the decoder reads before the answer, as the server gives it."""
    start = [config.decoder_start_token_id]
    if config.continuation_sentinel is not None:
        start.append(tokenizer.sentinel_id(config.continuation_sentinel))
    return tuple(start)


def closing_id(tokenizer: Tokenizer, config: ModelConfig) -> int:
    """What ends an answer: CPM-2's second sentinel, otherwise the end mark.

    Source: CPM-2's fine-tuning code, whose targets are <s_0> answer <s_1>.
    """
    if config.continuation_sentinel == 0 or not config.eos_token_ids:
        return tokenizer.sentinel_id(1)
    return config.eos_token_ids[0]


class _Tokens:
    """Reads with the tokenizer of a model."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config

    @property
    def closing(self) -> Ids:
        return (closing_id(self._tokenizer, self._config),)

    def close(self, text: str) -> list[int]:
        return encoder_ids(text, self._tokenizer, self._config)

    def spell(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(text)
        if not ids or set(ids) & self._tokenizer.control_ids:
            raise ValueError(f"the tokenizer cannot spell {text[:40]!r}")
        return ids


class _Maker:
    """Makes examples of the rows of one task."""

    def __init__(self, task: Task, reader: Reader, limit: int) -> None:
        self.task = task
        self.reader = reader
        self.limit = min(task.max_input_tokens, limit)
        self.mark = reader.spell(task.mark)[-1:] if task.mark else []
        self.words: dict[str, Ids] = {}
        for label, words in task.labels.items():  # before any row: no row is to blame
            for word in words:
                try:
                    self.spell(word)
                except ValueError as error:
                    raise ConfigError(f"task {task.name}, label {label!r}: {error}") from error

    def make(self, row: Row) -> Example:
        task = self.task
        if task.kind == "rank":
            return self._make_ranking(row)
        source = self._source(row.values)
        if task.kind == "choice":
            return self._make_choice(row, source)
        reference = self._answer_text(row.values)[task.answer.skip :].strip()
        ids = self.spell(reference)
        if len(ids) >= task.max_tokens:  # one more ends it
            raise ValueError(
                f"the answer has {len(ids) + 1} tokens; max_tokens is {task.max_tokens}"
            )
        target = (*ids, *self.reader.closing)
        return Example(row.line, (source,), target=target, reference=reference)

    def spell(self, word: str) -> Ids:
        """Ids of a word. Raises ValueError if the tokenizer has none for a part of it."""
        if word not in self.words:
            self.words[word] = tuple(self.reader.spell(word))
        return self.words[word]

    def _make_choice(self, row: Row, source: Ids) -> Example:
        task, labels = self.task, tuple(self.task.labels)
        words = tuple(tuple(map(self.spell, task.labels[label])) for label in labels)
        value: Any = row.values[task.answer.column]
        if task.answer.choices_from is not None:
            items = row.values[task.answer.choices_from]
            if not isinstance(items, list | tuple) or not items:
                raise ValueError(f"{task.answer.choices_from} is no list of choices")
            how = task.lists.get(task.answer.choices_from, ListFormat())
            told = how.numbers[: len(items)] if how.numbers else [str(item) for item in items]
            words = tuple((self.spell(one),) for one in told)
            labels = tuple(str(place) for place in range(len(items)))
            value = items.index(value) if value in items else value
        label = str(value)
        if label not in labels:
            raise ValueError(f"label {label[:40]!r} is unknown; known: {', '.join(labels)}")
        return Example(row.line, (source,), words, labels, labels.index(label))

    def _make_ranking(self, row: Row) -> Example:
        answer, values = self.task.answer, row.values
        if answer.negatives is not None:
            texts = [values[answer.column], values[answer.negatives]]
            gains: Any = [1.0, 0.0]
        else:
            texts, gains = values[answer.column], values[answer.gains or ""]
            if not isinstance(texts, list) or not isinstance(gains, list):
                raise ValueError(f"{answer.column} and {answer.gains} must be lists")
        if len(texts) < 2 or len(texts) != len(gains):
            raise ValueError(f"{len(texts)} texts with {len(gains)} gains; two or more of each")
        sources = tuple(self._source(dict(values) | {"text": text}) for text in texts)
        words = tuple(tuple(map(self.spell, words)) for words in self.task.labels.values())
        return Example(row.line, sources, words, tuple(self.task.labels), gains=tuple(gains))

    def _answer_text(self, values: Mapping[str, Any]) -> str:
        text = str(values[self.task.answer.column])
        if not text.strip():
            raise ValueError(f"{self.task.answer.column} is empty")
        return text

    def _source(self, values: Mapping[str, Any]) -> Ids:
        ids = self._encode(values)
        column = self.task.cut
        if len(ids) > self.limit and column is not None:
            longest = self.limit * MOST_CHARS
            low, high = 0, min(len(str(values[column])), longest)  # the longest beginning that fits
            while low < high:
                middle = (low + high + 1) // 2
                shorter = dict(values) | {column: str(values[column])[:middle]}
                low, high = (
                    (middle, high)
                    if len(self._encode(shorter)) <= self.limit
                    else (low, middle - 1)
                )
            ids = self._encode(dict(values) | {column: str(values[column])[:low]})
        if len(ids) > self.limit:
            raise ValueError(f"the text has {len(ids)} tokens; the limit is {self.limit}")
        if self.mark and self.mark[0] not in ids:
            raise ValueError(f"the text has no token {self.task.mark!r}, which marks the middle")
        return tuple(ids)

    def _encode(self, values: Mapping[str, Any]) -> list[int]:
        return self.reader.close(fill_template(self.task, values))
