"""Token shards: a text file of one document per line, tokenized once, read through a memory map.

A shard is a folder with `tokens.npy` (all documents in a row), `offsets.npy` (start of each, and
the end) and `shard.json` (what it was made of). `<n>` in a line stands for a newline, as in CPM-2's
data.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from engine.checkpoint_writer import sync
from engine.tokenizer import Tokenizer
from training.span_corruption import Ids

logger = logging.getLogger(__name__)

MIN_DOCUMENT_TOKENS = 10  # CPM-2 drops shorter ones
FORMAT_VERSION = 1
SHARD_FILES = ("tokens.npy", "offsets.npy", "shard.json")


class Shard:
    """Documents of one source as token ids."""

    def __init__(self, tokens: Ids, offsets: Ids) -> None:
        if len(offsets) < 2:
            raise ValueError("a shard without documents: check the text file it was made of")
        self.tokens = tokens
        self.offsets = offsets

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.offsets[-1])

    def document(self, index: int) -> Ids:
        """Ids of one document."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

    def window(self, rng: np.random.Generator, length: int) -> tuple[Ids, bool]:
        """Draw at most `length` tokens in a row of a document, all tokens equally likely.

        Returns the ids and whether they reach the end of the document.
        """
        position = int(rng.integers(self.num_tokens))
        index = int(np.searchsorted(self.offsets, position, side="right")) - 1
        document = self.document(index)
        if len(document) <= length:
            return document, True
        start = int(rng.integers(len(document) - length + 1))
        return document[start : start + length], start + length == len(document)


def read_shard(directory: Path) -> Shard:
    """Open a shard. Raises ValueError if its files are missing or do not belong together."""
    try:
        tokens = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
        offsets = np.load(directory / "offsets.npy", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{directory}: not a readable shard ({error}); delete it to make it again"
        ) from error
    if tokens.ndim != 1 or offsets.ndim != 1 or offsets[-1:].tolist() != [len(tokens)]:
        raise ValueError(f"{directory}: tokens and offsets disagree; delete it to make it again")
    return Shard(tokens, offsets)


def encode_documents(lines: Iterator[str], tokenizer: Tokenizer) -> Iterator[list[int]]:
    """Ids of each document that is long enough."""
    for line in lines:
        text = line.rstrip("\n").replace("<n>", "\n").strip()
        ids = tokenizer.encode(text)
        if len(ids) >= MIN_DOCUMENT_TOKENS:
            yield ids


def prepare_shard(
    text: Path,
    directory: Path,
    tokenizer: Tokenizer,
    tokenizer_key: str,
    on_progress: Callable[[int, int], None] | None = None,
) -> Shard:
    """Open the shard of a text file, making it first where it is missing or stale.

    `on_progress` is called with bytes done and bytes in all. A shard is stale when the file's size
    or modification time or the tokenizer's key differ from those it was made with.
    Raises ValueError if the text has no documents or is not UTF-8, or something is in the way.
    """
    status = text.stat()
    made_of = {
        "version": FORMAT_VERSION,
        "text": text.name,
        "bytes": status.st_size,
        "modified_ns": status.st_mtime_ns,
        "tokenizer": tokenizer_key,
    }
    if directory.exists():
        if _read_origin(directory) == made_of:
            return read_shard(directory)
        if foreign := {path.name for path in directory.iterdir()} - set(SHARD_FILES):
            raise ValueError(f"{directory}: holds {min(foreign)}, which is no part of a shard")
        logger.info("%s is stale and is made again", directory)
        shutil.rmtree(directory)
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokens, offsets = _encode_file(text, tokenizer, on_progress)
    np.save(partial / "tokens.npy", tokens)
    np.save(partial / "offsets.npy", offsets)
    (partial / "shard.json").write_text(json.dumps(made_of), encoding="utf-8")
    sync(*partial.iterdir(), partial)
    partial.replace(directory)
    return read_shard(directory)


def _read_origin(directory: Path) -> object:
    """What a shard was made of; None if a kill or a power cut has left that in pieces."""
    try:
        return json.loads((directory / "shard.json").read_bytes())
    except (OSError, ValueError):
        return None


def _encode_file(
    text: Path, tokenizer: Tokenizer, on_progress: Callable[[int, int], None] | None
) -> tuple[Ids, Ids]:
    dtype = np.uint16 if tokenizer.vocab_size <= np.iinfo(np.uint16).max + 1 else np.uint32
    chunks: list[Ids] = []
    offsets = [0]
    size, done = text.stat().st_size, 0

    def read_lines() -> Iterator[str]:
        nonlocal done
        with text.open("rb") as file:
            for number, raw in enumerate(file, 1):
                done += len(raw)
                if on_progress:
                    on_progress(done, size)
                try:
                    yield raw.decode("utf-8")
                except UnicodeDecodeError as error:
                    raise ValueError(f"{text}:{number}: not UTF-8 ({error.reason})") from error

    for ids in encode_documents(read_lines(), tokenizer):
        chunks.append(np.array(ids, dtype))
        offsets.append(offsets[-1] + len(ids))
    if not chunks:
        raise ValueError(f"{text}: no document of at least {MIN_DOCUMENT_TOKENS} tokens")
    return np.concatenate(chunks), np.array(offsets, np.int64)
