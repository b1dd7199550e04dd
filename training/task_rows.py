"""Rows of labelled data from CSV, TSV, JSON, JSON lines or a folder of Hugging Face datasets."""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row by column, and where it was: the line of a file, or the number of the row."""

    line: int
    values: dict[str, Any]


READERS = (".csv", ".tsv", ".jsonl", ".json")
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # what such files begin with
MAX_DEPTH = 8  # of lists in lists
BLANK = re.compile(r"#idiom\d*#")  # of ChID; with a number where the answers are in another file


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """All rows of a file or folder, each with the columns that are named.

    Raises ValueError, naming file and line, if it is empty, a column is missing or twice there, a
    value is no text, number or list, or it cannot be read as what its name says, in UTF-8.
    """
    suffix = path.suffix.lower()
    if path.is_dir():
        rows = _read_datasets(path)
    elif suffix not in READERS:
        raise ValueError(f"{path}: is of no known kind; allowed: {', '.join(READERS)}, a folder")
    else:
        read: dict[str, Callable[[Path, str], Iterator[Row]]] = {
            ".csv": _read_csv,
            ".tsv": _read_csv,
            ".jsonl": _read_lines,
            ".json": _read_array,
        }
        rows = list(read[suffix](path, _read_text(path)))
    if not rows:
        raise ValueError(f"{path}: holds no row")
    for row in rows:
        for column in columns:
            try:
                _check_value(row.values, column)
            except ValueError as error:
                raise ValueError(f"{path}, line {row.line}: {error}") from error
    return rows


def _check_value(values: dict[str, Any], column: str) -> None:
    """Raise ValueError unless a row has a column, and text, a number or a list of these in it."""
    if column not in values:
        known = ", ".join(str(key) for key in values)
        raise ValueError(f"has no column {column!r}; it has {known or 'none'}")
    if values[column] is None:
        raise ValueError(f"column {column!r} has no value")
    if (what := _find_odd(values[column])) is not None:
        raise ValueError(f"column {column!r} holds {what}; expected text, a number or a list")


def _find_odd(value: object, depth: int = 0) -> str | None:
    """What a value is or holds that is neither text nor a number, if anything."""
    if depth > MAX_DEPTH:
        return f"lists in lists, more than {MAX_DEPTH} deep"
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can write it, no file can
            return "half of a pair of surrogates"
        return None
    if isinstance(value, list | tuple):
        return next(
            (what for one in value if (what := _find_odd(one, depth + 1)) is not None), None
        )
    if isinstance(value, int | float):
        is_number = isinstance(value, int) or math.isfinite(value)  # an int may be beyond floats
        return None if is_number else f"{value}"
    return "nothing" if value is None else f"{str(value)[:40]!r}"


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        kind = "UTF-16" if data.startswith(UTF_16) else "GB18030"
        raise ValueError(
            f"{path}, line {line}: is not UTF-8 (byte {data[error.start]:#04x}); convert the file, "
            f"for example with iconv -f {kind} -t UTF-8"
        ) from error
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise ValueError(
            f"{path}, line {line}: has a zero byte: it is in UTF-16, or no text; convert the file"
        )
    return text


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    is_tsv = path.suffix.lower() == ".tsv"
    # in a TSV of this kind a quotation mark is a character as any other
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
    # lines end as csv says: not at U+2028 and the like, which texts hold
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True, **how)
    try:
        names = reader.fieldnames or ()
        _check_names(path, reader.line_num, names)
        for values in reader:
            if None in values:
                raise ValueError(f"{path}, line {reader.line_num}: has more fields than the header")
            yield Row(reader.line_num, values)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from error


def _check_names(path: Path, line: int, names: Sequence[str]) -> None:
    """Raise ValueError for a name that stands there twice: one of the two would be lost."""
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise ValueError(f"{path}, line {line}: has two columns {twice[0]!r}; rename one")


def _load_json(text: str) -> Any:
    """Raise ValueError for what is no JSON, and for an object with two of one name."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = Counter(name for name, _ in pairs)
            raise ValueError(f"{names.most_common(1)[0][0]!r} is there twice")
        return values

    return json.loads(text, object_pairs_hook=build)


def _read_lines(path: Path, text: str) -> Iterator[Row]:
    answers: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values = _load_json(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: is no JSON: {error}") from error
            values = _object(path, number, values)
            if _is_chid(values):
                answers = answers or ({} if "groundTruth" in values else _chid_answers(path))
                yield from _open_chid(path, number, values, answers)
            else:
                yield Row(number, values)


def _read_array(path: Path, text: str) -> Iterator[Row]:
    """A JSON array of objects, or C3's own form; the line is the number of the item.

    Many data sets have lines of objects in files that are named so.
    """
    if text.lstrip().startswith("{"):
        yield from _read_lines(path, text)
        return
    try:
        items = _load_json(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: is no JSON: {error}") from error
    if not isinstance(items, list):
        raise ValueError(f"{path}: holds no list of objects")
    for number, item in enumerate(items, 1):
        if isinstance(item, list):
            yield from _open_c3(path, number, item)
        else:
            yield Row(number, _object(path, number, item))


def _open_c3(path: Path, number: int, item: list[Any]) -> Iterator[Row]:
    """C3's [[lines of a text], [questions], id]: a row for each question."""
    is_c3 = len(item) >= 2 and isinstance(item[0], list) and isinstance(item[1], list)
    if not is_c3 or not all(isinstance(line, str) for line in item[0]):
        raise ValueError(f"{path}, line {number}: expected an object, or [[text], [questions], id]")
    for question in item[1]:
        yield Row(number, {"text": "\n".join(item[0])} | _object(path, number, question))


def _is_chid(values: dict[str, Any]) -> bool:
    texts = values.get("content"), values.get("candidates")
    return all(texts) and BLANK.search(str(texts[0])) is not None


def _open_chid(
    path: Path, number: int, values: dict[str, Any], answers: dict[str, Any]
) -> Iterator[Row]:
    """ChID's texts with blanks: a row for each blank, the other blanks left out of its text.

    Right answers and candidates stand beside the text, for each blank; or the candidates are for
    all blanks of several texts, and NAME_answer.json tells the place of the right one by blank.

    Source: ChID (arXiv:1906.01265), the published files of it and of its competition.
    """
    contents, candidates = values["content"], values["candidates"]
    contents = [contents] if isinstance(contents, str) else contents
    truth = values.get("groundTruth")
    place = 0
    for content in contents:
        for blank in BLANK.finditer(str(content)):
            try:
                listed = candidates if truth is None else candidates[place]
                answer = answers[blank[0]] if truth is None else truth[place]
            except (KeyError, IndexError) as error:
                raise ValueError(f"{path}, line {number}: no answer for {blank[0]}") from error
            before, after = content[: blank.start()], content[blank.end() :]
            parts = {"before": BLANK.sub("", before), "after": BLANK.sub("", after)}
            yield Row(number, parts | {"candidates": listed, "answer": answer})
            place += 1


def _chid_answers(path: Path) -> dict[str, Any]:
    """The places of right answers by blank, in the file beside the texts."""
    beside = path.with_name(f"{path.stem}_answer.json")
    try:
        values = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{beside}: cannot be read as JSON, the answers of {path.name}") from error
    return _object(beside, 1, values)


def _object(path: Path, number: int, values: Any) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{path}, line {number}: holds no object but {str(values)[:40]!r}")
    return values


def _read_datasets(path: Path) -> list[Row]:
    """A split that `Dataset.save_to_disk` wrote."""
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"{path}: is a folder; to read one of Hugging Face datasets, run pip install datasets"
        ) from error
    try:
        found = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: is no folder of Hugging Face datasets: {error}") from error
    if isinstance(found, datasets.DatasetDict):
        raise ValueError(f"{path}: holds several splits; name the folder of one: {list(found)}")
    return [Row(number, dict(values)) for number, values in enumerate(found, 1)]
