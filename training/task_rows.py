"""Rows of labelled data from CSV, TSV, JSON, JSON lines or a folder of Hugging Face datasets."""

import csv
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A row by column, and where it was: the line of a file, or the number of the row."""

    line: int
    values: dict[str, Any]


READERS = (".csv", ".tsv", ".jsonl", ".json")
BLANK = re.compile(r"#idiom\d*#")  # of ChID; with a number where the answers are in another file


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
    answers: dict[str, Any] = {}
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values = json.loads(line)
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
