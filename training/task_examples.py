"""From rows to token ids: what the encoder reads, what may follow, and which of it is right.

All is checked before a model is loaded: a row that cannot be used is an error that names its line.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from engine.adapters import Slots
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.tokenizer import Tokenizer
from training.task_readers import Ids, Reader, TokenReader, inner_ids, needs_space
from training.task_rows import Row, read_rows
from training.tasks import FIELD, LABEL, MIDDLE, ListFormat, Task

MOST_CHARS = 24  # of a token, in any vocabulary


@dataclass(frozen=True, slots=True)
class Example:
    """A row that is ready to be asked.

    A choice has one source, the words of each label, and the number of the right one; a ranking a
    source for each text and its gain; what is generated a target, which ends in what closes it. In
    a choice that `is_paired` each word has a source of its own.
    """

    line: int
    sources: tuple[Ids, ...]
    words: tuple[tuple[Ids, ...], ...] = ()
    labels: tuple[str, ...] = ()
    answer: int = 0
    gains: tuple[float, ...] = ()
    target: Ids = ()
    reference: str = ""
    is_paired: bool = False

    def asked(self) -> list[tuple[tuple[int, Ids], ...]]:
        """What makes up each score: words, each with the number of the source that it follows."""
        if not self.is_paired:
            numbers = range(len(self.sources))
            return [tuple((n, word) for word in words) for n in numbers for words in self.words]
        number = count()
        return [tuple((next(number), word) for word in words) for words in self.words]

    @property
    def right(self) -> tuple[Ids, Ids]:
        """The right answer, what is generated or the first word of a label, after its source."""
        number, ids = (0, self.target) if self.target else self.asked()[self.answer][0]
        return self.sources[number], ids


def read_examples(
    path: Path, task: Task, tokenizer: Tokenizer, config: ModelConfig, num_vectors: int = 0
) -> list[Example]:
    """Read a file of rows as a task tells, beside so many vectors of a prompt.

    Raises ValueError, naming file and line, for a row that cannot be used.
    """
    limit = config.max_prompt_tokens - num_vectors
    return read_with(TokenReader(tokenizer, config), limit, path, task)


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
    ids = inner_ids(tokenizer.encode, task.mark)
    if not ids or ids[-1] in tokenizer.control_ids:
        raise ConfigError(f"the tokenizer cannot spell {task.mark!r}, which marks the middle")
    return Slots(**counts, middle_mark=ids[-1])


def fill_template(task: Task, values: Mapping[str, Any], template: str | None = None) -> str:
    """The text of a row: fields by their columns, lists as the task says."""

    def fill(name: str) -> str:
        if name == MIDDLE:
            return ""
        value = values[name]
        if isinstance(value, list | tuple):
            return format_list(value, task.lists.get(name, ListFormat(join=" ")))
        return str(value)

    return FIELD.sub(lambda match: fill(match[1]), task.template if template is None else template)


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


class _Maker:
    """Makes examples of the rows of one task."""

    def __init__(self, task: Task, reader: Reader, limit: int) -> None:
        self.task = task
        self.reader = reader
        self.mark = reader.spell(task.mark)[-1:] if task.mark else []
        self.words: dict[str, Ids] = {}
        self.most = limit  # tokens of a word or an answer
        self._check_labels()  # before any row: no row is to blame
        self.limit = min(task.max_input_tokens, limit - self._room())

    def _check_labels(self) -> None:
        """Raise ConfigError for words that cannot be spelled, or that two labels have in common."""
        known: dict[Ids, str] = {}
        for label, words in self.task.labels.items():
            for word in words:
                try:
                    other = known.setdefault(self.spell(word), label)
                except ValueError as error:
                    raise ConfigError(f"task {self.task.name}, label {label!r}: {error}") from error
                if other != label:
                    raise ConfigError(
                        f"task {self.task.name}: the tokens of {word!r} stand for the labels "
                        f"{other!r} and {label!r}; give one of them another word"
                    )
        if self.task.by == "total" and self.task.continuation is None:
            self._check_beginnings(known)

    def _check_beginnings(self, known: Mapping[Ids, str]) -> None:
        """Raise ConfigError for a label that is never chosen: what begins its words is likelier."""
        for label, words in self.task.labels.items():
            beginnings = [
                {known.get(ids[:length]) for length in range(1, len(ids))}
                for ids in map(self.spell, words)
            ]
            never = set.intersection(*beginnings) - {None, label}
            if never and not any(label in found for found in beginnings):
                raise ConfigError(
                    f"task {self.task.name}: label {label!r} would never be chosen: {words[0]!r} "
                    f"begins as a word of label {never.pop()!r}, which is likelier after any text; "
                    'give other words, or by = "mean"'
                )

    def _room(self) -> int:
        """Positions that an answer may take behind a text, where both are in one row."""
        if not self.reader.is_decoder_only or self.task.continuation is not None:
            return 0
        if not self.task.labels:
            return self.task.max_tokens
        return 1 + max(map(len, self.words.values()))  # one for a space

    def make(self, row: Row) -> Example:
        task = self.task
        if task.kind == "rank":
            return self._make_ranking(row)
        if task.kind == "choice":
            return self._make_choice(row)
        text, source = self._source(row.values)
        reference = self._answer_text(row.values)[task.answer.skip :].strip()
        ids = self.spell(reference, text)
        if len(ids) >= task.max_tokens:  # one more ends it
            raise ValueError(
                f"the answer has {len(ids) + 1} tokens; max_tokens is {task.max_tokens}"
            )
        target = (*ids, *self.reader.closing)
        return Example(row.line, (source,), target=target, reference=reference)

    def spell(self, word: str, before: str = "") -> Ids:
        """Ids of a word behind a text.

        Raises ValueError if the tokenizer has none for a part of it, or they are too many.
        """
        if self.reader.is_decoder_only and needs_space(before, word):
            word = f" {word}"
        if word not in self.words:
            ids = tuple(self.reader.spell(word))
            if len(ids) > self.most:
                raise ValueError(f"{word[:40]!r} has {len(ids)} tokens; the limit is {self.most}")
            self.words[word] = ids
        return self.words[word]

    def _make_choice(self, row: Row) -> Example:
        task = self.task
        told = self._told(row)
        value: Any = row.values[task.answer.column]
        if task.answer.choices_from is not None:
            items = row.values[task.answer.choices_from]
            value = items.index(value) if value in items else value
        label = str(value)
        if label not in told:
            raise ValueError(f"label {label[:40]!r} is unknown; known: {', '.join(told)}")
        told = self._draw(told, label, row.line)
        labels = tuple(told)
        answer = labels.index(label)
        if task.continuation is not None:
            sources, words = self._pairs(row.values, list(told.values()))
            return Example(row.line, sources, words, labels, answer, is_paired=True)
        text, source = self._source(row.values)
        words = tuple(tuple(self.spell(word, text) for word in group) for group in told.values())
        return Example(row.line, (source,), words, labels, answer)

    def _told(self, row: Row) -> dict[str, tuple[str, ...]]:
        """The words of each label that a row may have."""
        task = self.task
        if task.answer.choices_from is None:
            return dict(task.labels)
        items = row.values[task.answer.choices_from]
        if not isinstance(items, list | tuple) or len(items) < 2:
            raise ValueError(f"{task.answer.choices_from} is no list of two choices or more")
        how = task.lists.get(task.answer.choices_from, ListFormat())
        told = how.numbers[: len(items)] if how.numbers else [str(item) for item in items]
        return {str(place): (one,) for place, one in enumerate(told)}

    def _draw(
        self, told: dict[str, tuple[str, ...]], label: str, line: int
    ) -> dict[str, tuple[str, ...]]:
        """The right label and some others, in their order; a row's are the same every time."""
        others = [one for one in told if one != label]
        if not self.task.candidates or len(others) < self.task.candidates:
            return told
        draw = random.Random(f"{self.task.seed} {line}")
        kept = {label, *draw.sample(others, self.task.candidates - 1)}
        return {one: words for one, words in told.items() if one in kept}

    def _pairs(
        self, values: Mapping[str, Any], told: Sequence[tuple[str, ...]]
    ) -> tuple[tuple[Ids, ...], tuple[tuple[Ids, ...], ...]]:
        """Sources of all words in order, and by label what follows each."""

        def read(values: Mapping[str, Any]) -> list[list[tuple[Ids, Ids]]]:
            return [[self._pair(dict(values) | {LABEL: word}) for word in words] for words in told]

        def measure(values: Mapping[str, Any]) -> int:
            pairs = [pair for group in read(values) for pair in group]
            return max(len(source) + len(target) for source, target in pairs)

        found = read(self._shorten(values, measure))
        words = tuple(tuple(target for _, target in group) for group in found)
        return tuple(source for group in found for source, _ in group), words

    def _pair(self, values: Mapping[str, Any]) -> tuple[Ids, Ids]:
        before = fill_template(self.task, values)
        text = fill_template(self.task, values, self.task.continuation)
        if before or not self.reader.is_decoder_only:
            space = " " if self.reader.is_decoder_only and needs_space(before, text) else ""
            pair = tuple(self.reader.close(before)), tuple(self.reader.follow(space + text))
        else:  # the first token, or the mark before it, has nothing that it follows
            ids = tuple(self.reader.close(text))
            pair = ids[:1], ids[1:]
        if not all(pair):
            raise ValueError(f"the text {text[:40]!r} has no token to be scored")
        return pair

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
        if bad := [one for one in gains if type(one) not in (int, float) or one < 0]:
            raise ValueError(f"{answer.gains} holds {bad[0]!r}; expected numbers, 0 or more")
        found = [self._source(dict(values) | {"text": text}) for text in texts]
        (words,) = self.task.labels.values()
        # of a decoder-only model the words are the same after each text: as after the first
        spelled = tuple(self.spell(word, found[0][0]) for word in words)
        sources = tuple(source for _, source in found)
        return Example(row.line, sources, (spelled,), tuple(self.task.labels), gains=tuple(gains))

    def _answer_text(self, values: Mapping[str, Any]) -> str:
        column = self.task.answer.column
        if isinstance(values[column], list | tuple):
            raise ValueError(f"{column} is a list; expected a text")
        text = str(values[column])
        if not text.strip():
            raise ValueError(f"{column} is empty")
        return text

    def _source(self, values: Mapping[str, Any]) -> tuple[str, Ids]:
        """The text of a row and its ids."""
        values = self._shorten(values, lambda given: len(self._encode(given)))
        ids = self._encode(values)
        if self.mark and self.mark[0] not in ids:
            raise ValueError(f"the text has no token {self.task.mark!r}, which marks the middle")
        return fill_template(self.task, values), tuple(ids)

    def _shorten(
        self, values: Mapping[str, Any], measure: Callable[[Mapping[str, Any]], int]
    ) -> Mapping[str, Any]:
        """The values, of the column that is cut the longest beginning that fits.

        Raises ValueError if there is none.
        """
        size, column = measure(values), self.task.cut
        if size > self.limit and column is not None:
            if isinstance(values[column], list | tuple):
                raise ValueError(
                    f"the text has {size} tokens, the limit is {self.limit}, and {column}, which "
                    "is a list, cannot be cut"
                )
            text = str(values[column])
            low, high = 0, min(len(text), self.limit * MOST_CHARS)
            while low < high:
                middle = (low + high + 1) // 2
                size = measure(dict(values) | {column: text[:middle]})
                low, high = (middle, high) if size <= self.limit else (low, middle - 1)
            values = dict(values) | {column: text[:low]}
            size = measure(values)
        if size > self.limit:
            raise ValueError(f"the text has {size} tokens; the limit is {self.limit}")
        return values

    def _encode(self, values: Mapping[str, Any]) -> list[int]:
        return self.reader.close(fill_template(self.task, values))
