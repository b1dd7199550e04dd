"""Build a vocabulary file in the layout of CPM-2's bilingual one, from text files."""

import heapq
import logging
import string
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from engine.tokenizer_cpm2 import load_segmenter
from training.corpus import NEWLINE_MARK
from training.extraction import common_characters

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    *("<unk>", "<s>", "</s>", "\u2583", "<sep>", "<pad>", "<mask>", "<go>", "<eod>"),
    *("\u2581", ",", "\u2582"),
)
ASCII = string.ascii_letters + string.digits + string.punctuation
PUNCTUATION = "，。！？；：、（）“”‘’《》〈〉「」『』【】〔〕［］…—－～·％＋＝＜＞／＆＊＂｜￥℃°×"
CHAR_COVERAGE = 0.9965
SURPLUS = 1.15
MAX_SEGMENT_CHARS = 200


def build_vocabulary(
    files: Sequence[Path],
    size: int,
    num_sentinels: int = 100,
    sample_bytes: int = 16_000_000,
) -> list[str]:
    """Choose the tokens of a bilingual vocabulary; the id of a token is its index.

    Special tokens come first, sentinels last. Between them: every printable ASCII character, bare
    and as a "##" continuation; common Chinese punctuation; the common characters (GB 2312 level 1)
    and the most frequent others until CHAR_COVERAGE of the text is covered; then, in both scripts
    alike, what byte-pair merging within jieba's segments saves most tokens with. The pieces are
    ordered by how often they are used.

    Raises ValueError if `size` has no room for the fixed tokens and characters, or if the text
    yields too few pieces to reach it.
    Source: layout and "##" rule of the CPM-2 bilingual tokenizer (arXiv:2106.10715 s2.2); merging
    after Sennrich et al. (arXiv:1508.07909).
    """
    segments = count_segments(sample_lines(files, sample_bytes))
    base = _base_pieces(segments)
    room = size - len(SPECIAL_TOKENS) - num_sentinels
    if room < len(base):
        raise ValueError(
            f"size {size} has room for {room} pieces, but the single characters alone are "
            f"{len(base)}; ask for at least {size - room + len(base)}, or give less varied text"
        )
    merged = learn_merges(segments, base, int(SURPLUS * (room - len(base))))
    usage = count_usage(segments, base | merged.keys())
    extras = sorted(merged, key=lambda piece: (-usage[piece], piece))[: room - len(base)]
    if len(extras) < room - len(base):
        raise ValueError(
            f"the text yields {len(base) + len(extras)} pieces, but size {size} needs {room}; "
            "give more text or ask for a smaller vocabulary"
        )
    pieces = sorted(base | set(extras), key=lambda piece: (-usage[piece], piece))
    logger.info("%d characters, %d merged pieces", len(base), len(extras))
    return [*SPECIAL_TOKENS, *pieces, *(f"<s_{index}>" for index in range(num_sentinels))]


def sample_lines(files: Sequence[Path], sample_bytes: int) -> Iterator[str]:
    """Yield evenly spread documents of all files, about sample_bytes in total."""
    stride = max(1, -(-sum(path.stat().st_size for path in files) // sample_bytes))
    for path in files:
        with path.open(encoding="utf-8") as lines:
            for index, line in enumerate(lines):
                if index % stride == 0:
                    yield line.rstrip("\n")


def count_segments(documents: Iterable[str]) -> Counter[str]:
    """Count jieba's segments, without those of white space."""
    counts: Counter[str] = Counter()
    segment = load_segmenter()
    for document in documents:
        counts.update(segment(document.replace(NEWLINE_MARK, "\n")))
    return Counter({text: count for text, count in counts.items() if not text.isspace()})


def has_cjk(text: str) -> bool:
    """Say whether any character is in U+4E00..U+9FFF."""
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def piece_name(text: str, at_start: bool) -> str:
    """Return the vocabulary entry for a part of a segment: "##" marks a Latin continuation.

    Example: "ing" is looked up as "ing" at the start of a segment and as "##ing" inside one.
    """
    return text if at_start or has_cjk(text) else "##" + text


def _base_pieces(segments: Counter[str]) -> set[str]:
    counts: Counter[str] = Counter()
    for segment, count in segments.items():
        for char in segment:
            if not char.isascii():
                counts[char] += count
    chosen = set(PUNCTUATION) | (common_characters() & counts.keys())
    missing = (1 - CHAR_COVERAGE) * sum(counts.values())
    for char, count in sorted(counts.items(), key=lambda item: (item[1], item[0])):
        missing -= count if char not in chosen else 0
        if missing < 0:
            chosen.add(char)
    return (chosen | set(ASCII) | {"##" + char for char in ASCII}) - set(SPECIAL_TOKENS)


def learn_merges(segments: Counter[str], base: set[str], num_merges: int) -> dict[str, int]:
    """Merge the most frequent pair of neighbouring pieces, num_merges times or until none is left.

    Returns each new piece with the count of its pair, in order. Ties go to the smaller strings.
    """
    words = [_split_word(segment, base) for segment in segments]
    weights = list(segments.values())
    pairs: Counter[tuple[str, str]] = Counter()
    places: defaultdict[tuple[str, str], set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in _pairs(word):
            pairs[pair] += weights[index]
            places[pair].add(index)
    queue = [(-count, pair) for pair, count in pairs.items()]
    heapq.heapify(queue)
    merged: dict[str, int] = {}
    while queue and len(merged) < num_merges:
        count, pair = heapq.heappop(queue)
        if pairs[pair] != -count or not count:
            continue  # an older count of this pair
        name = _join(pair)
        if name not in base:
            merged.setdefault(name, -count)
        changed = set()
        for index in sorted(places.pop(pair)):
            changed |= _merge_word(index, pair, words, weights, pairs, places)
        for other in changed:
            heapq.heappush(queue, (-pairs[other], other))
    return merged


def _split_word(segment: str, base: set[str]) -> list[str]:
    if "#" in segment:
        return []  # a merged "##x" could not be told from a continuation
    names = [piece_name(char, index == 0) for index, char in enumerate(segment)]
    return [name if name in base else "" for name in names]  # "" is unknown and never merges


def _pairs(word: list[str]) -> Iterator[tuple[str, str]]:
    return ((left, right) for left, right in zip(word, word[1:], strict=False) if left and right)


def _join(pair: tuple[str, str]) -> str:
    left, right = (name[2:] if _is_continuation(name) else name for name in pair)
    return piece_name(left + right, at_start=not _is_continuation(pair[0]))


def _is_continuation(name: str) -> bool:
    return len(name) > 2 and name.startswith("##")


def _merge_word(
    index: int,
    pair: tuple[str, str],
    words: list[list[str]],
    weights: list[int],
    pairs: Counter[tuple[str, str]],
    places: defaultdict[tuple[str, str], set[int]],
) -> set[tuple[str, str]]:
    """Merge the pair inside one word, keep the counts true, return the pairs that changed."""
    old = words[index]
    new: list[str] = []
    position = 0
    while position < len(old):
        if tuple(old[position : position + 2]) == pair:
            new.append(_join(pair))
            position += 2
        else:
            new.append(old[position])
            position += 1
    for neighbours, sign in ((_pairs(old), -1), (_pairs(new), 1)):
        for other in neighbours:
            pairs[other] += sign * weights[index]
    for other in _pairs(new):
        places[other].add(index)
    words[index] = new
    return {other for other in (*_pairs(old), *_pairs(new)) if pairs[other] > 0}


def count_usage(segments: Counter[str], vocabulary: Iterable[str]) -> Counter[str]:
    """Count how often greedy longest matching uses each entry of the vocabulary."""
    known = frozenset(vocabulary)
    longest = max(map(len, known), default=1)
    usage: Counter[str] = Counter()
    for segment, count in segments.items():
        for piece in match_pieces(segment, known, longest):
            usage[piece] += count
    return usage


def match_pieces(segment: str, known: frozenset[str], longest: int) -> list[str]:
    """Split one segment by greedy longest match, "<unk>" for a character without an entry."""
    if len(segment) > MAX_SEGMENT_CHARS:
        return [SPECIAL_TOKENS[0]]
    pieces: list[str] = []
    start = 0
    while start < len(segment):
        for end in range(min(len(segment), start + longest), start, -1):
            name = piece_name(segment[start:end], at_start=start == 0)
            if name in known:
                pieces.append(name)
                start = end
                break
        else:
            pieces.append(SPECIAL_TOKENS[0])
            start += 1
    return pieces


def write_vocabulary(tokens: Sequence[str], path: Path) -> None:
    """Write one token per line, UTF-8, so that the id of a token is its line number."""
    path.write_text("".join(token + "\n" for token in tokens), encoding="utf-8")
