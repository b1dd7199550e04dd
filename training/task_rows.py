"""Rows of labelled data from CSV, TSV, JSON, JSON lines or a folder of Hugging Face datasets."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row by column, and where it was: the line of a file, or the number of the row."""

    line: int
    values: dict[str, Any]


READERS = (".csv", ".tsv", ".jsonl", ".json")


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """All rows of a file or folder, each with the columns that are named.

    Raises ValueError, naming file and line, if it is empty, a column is missing, or it cannot be
    read as what its name says, in UTF-8.
    """
    if path.is_dir():
        rows = _read_datasets(path)
    elif path.suffix not in READERS:
        raise ValueError(f"{path}: is of no known kind; allowed: {', '.join(READERS)}, a folder")
    else:
        read: dict[str, Callable[[Path, str], Iterator[Row]]] = {
            ".csv": _read_csv,
            ".tsv": _read_csv,
            ".jsonl": _read_lines,
            ".json": _read_array,
        }
        rows = list(read[path.suffix](path, _read_text(path)))
    if not rows:
        raise ValueError(f"{path}: holds no row")
    for row in rows:
        for column in columns:
            if row.values.get(column) is None:
                known = ", ".join(str(key) for key in row.values)
                raise ValueError(
                    f"{path}, line {row.line}: has no column {column!r}; it has {known or 'none'}"
                )
    return rows


def _read_text(path: Path) -> str:
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{path}, line {line}: is not UTF-8 (byte {data[error.start]:#04x}); convert the file, "
            "for example with iconv -f GB18030 -t UTF-8"
        ) from error


def _read_csv(path: Path, text: str) -> Iterator[Row]:
    is_tsv = path.suffix == ".tsv"
    # in a TSV of this kind a quotation mark is a character as any other
    how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {}
    reader = csv.DictReader(text.splitlines(keepends=True), strict=True, **how)
    try:
        for values in reader:
            if None in values:
                raise ValueError(f"{path}, line {reader.line_num}: has more fields than the header")
            yield Row(reader.line_num, values)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.reader.line_num}: {error}") from error


def _read_lines(path: Path, text: str) -> Iterator[Row]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{path}, line {number}: is no JSON: {error}") from error
            yield Row(number, _object(path, number, values))


def _read_array(path: Path, text: str) -> Iterator[Row]:
    """A JSON array of objects, or C3's own form; the line is the number of the item."""
    try:
        items = json.loads(text)
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
