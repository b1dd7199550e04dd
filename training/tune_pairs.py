"""Pairs of sentences out of plain text, to pre-train a prompt where labelled rows are few.

Source: Gu et al., PPT (arXiv:2109.04332) s3.2: whether the second sentence follows the first, is
from elsewhere in the same text, or from another text.
"""

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from engine.checkpoint_writer import sync

LABELS = ("next", "same", "other")
MIN_CHARS, MAX_CHARS = 4, 60  # of a sentence
APART = 2  # sentences between, at least, so that a pair is no longer a following one
SENTENCE = re.compile(r"[^。！？!?]+[。！？!?]?")


def split_sentences(text: str) -> list[str]:
    """Sentences of a text, of a length that is of use."""
    found = (one.strip() for one in SENTENCE.findall(text.replace("<n>", "")))
    return [one for one in found if MIN_CHARS <= len(one) <= MAX_CHARS]


def make_pairs(paths: Sequence[Path], out: Path, count: int, seed: int) -> int:
    """Write rows of first, second and label as JSON lines, as many of each label; returns how many.

    `paths` are text files with one document a line. Raises ValueError if they have too few.
    """
    texts = []
    for path in paths:
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: is not UTF-8; convert the file") from error
        texts += [found for line in lines if len(found := split_sentences(line)) > APART]
    if len(texts) < 2:
        raise ValueError(
            f"{len(texts)} lines have more than {APART} sentences of {MIN_CHARS} to {MAX_CHARS} "
            "characters; give more text, one document a line"
        )
    rows = _draw(texts, random.Random(seed))
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        for _ in range(count):
            file.write(json.dumps(next(rows), ensure_ascii=False) + "\n")
    sync(partial)
    partial.replace(out)
    return count


def _draw(texts: Sequence[Sequence[str]], chance: random.Random) -> Iterator[dict[str, str]]:
    """Rows without end, the labels by turns."""
    while True:
        for label in LABELS:
            index = chance.randrange(len(texts))
            text = texts[index]
            first = chance.randrange(len(text) - APART)
            second = text[first + 1]
            if label == "same":
                second = text[chance.randrange(first + APART, len(text))]
            elif label == "other":
                number = chance.randrange(len(texts) - 1)
                second = chance.choice(texts[number + (number >= index)])
            yield {"first": text[first], "second": second, "label": label}
