"""The tokenizers of CPM-2, Chinese and bilingual: jieba's segments, matched with a `vocab.txt`."""

import functools
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from pathlib import Path

from engine.errors import TokenizerError
from engine.tokenizer import decode_ids, pick_sentinel

Segmenter = Callable[[str], Iterable[str]]

SPACE_MARK = "\u2582"
NEWLINE_MARK = "\u2583"
TEXT_TO_MARKS = str.maketrans(" \n", SPACE_MARK + NEWLINE_MARK)
MARKS_TO_TEXT = str.maketrans(SPACE_MARK + NEWLINE_MARK, " \n")
CONTROL_TOKENS = frozenset(
    ("<unk>", "<s>", "</s>", "<sep>", "<pad>", "<mask>", "<go>", "<eod>"),
)
NEEDED_TOKENS = ("<unk>", "<s>", "<pad>", "<eod>", SPACE_MARK, NEWLINE_MARK)
KEPT_WIDE = "，。！（）？、；："
WIDE_TO_NARROW = {0x3000: " "} | {
    code: chr(code - 0xFEE0) for code in range(0xFF00, 0xFF5F) if chr(code) not in KEPT_WIDE
}
MAX_SEGMENT_CHARS = 200
PIECE_PREFIX = "##"


class Word(IntEnum):
    """What the last word of a bilingual text is; also what a token begins, PIECE if it goes on."""

    NONE = 0
    ENGLISH = 1
    CHINESE = 2
    SPACE = 3
    SPACE_AFTER_ENGLISH = 4
    PIECE = 5


class Cpm2Tokenizer:
    """Segments of jieba, each cut greedily into the longest tokens of the vocabulary.

    Chinese mode first narrows full-width characters; its decoding is the exact reverse of the rest.
    Bilingual mode marks what goes on inside a segment with "##", and leaves out a space between two
    tokens that are not Chinese (punctuation and digits are not); decoding puts one between any two
    such words, so it is not an exact reverse: "x=1" comes back as "x = 1".

    The original bilingual tokenizer returns the only token of a text twice; `legacy_duplicate`
    brings that back, for weights that were fine-tuned on single-word inputs made so.

    Source: CPM-2 (arXiv:2106.10715) s2.2, and its published fine-tuning code for the details.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        segment: Segmenter,
        *,
        bilingual: bool,
        legacy_duplicate: bool = False,
    ) -> None:
        ids = {token: token_id for token_id, token in enumerate(tokens)}
        self._unknown_id = ids["<unk>"]
        self._space_id = ids[SPACE_MARK]
        self._sentinels = _find_sentinels(ids)
        self._sentinel_indices = {token_id: i for i, token_id in enumerate(self._sentinels)}
        # jieba never puts "<" inside a segment, so these cannot be met anyway; a segmenter that
        # did must not turn a typed "<eod>" into an end of text.
        self.control_ids = frozenset(ids[token] for token in CONTROL_TOKENS & ids.keys())
        control = self.control_ids | set(self._sentinels)
        self._ids = {token: i for token, i in ids.items() if i not in control}
        self._longest = max(map(len, self._ids))
        self._segment = segment
        self._bilingual = bilingual
        self._legacy_duplicate = legacy_duplicate
        self._words = [_classify(token) for token in tokens]
        self._spelled = [_spell_token(token, bilingual) for token in tokens]

    @property
    def vocab_size(self) -> int:
        return len(self._spelled)

    @property
    def num_sentinels(self) -> int:
        return len(self._sentinels)

    def encode(self, text: str) -> list[int]:
        if not self._bilingual:
            text = text.translate(WIDE_TO_NARROW)
        ids: list[int] = []
        for segment in self._segment(text):
            ids += self._match(segment.translate(TEXT_TO_MARKS))
        if not self._bilingual:
            return ids
        ids = self._drop_spaces(ids)
        return ids * 2 if self._legacy_duplicate and len(ids) == 1 else ids

    def decode(self, ids: Sequence[int]) -> str:
        return decode_ids(self, ids)

    def spell(self, token_id: int, state: int) -> tuple[bytes, int]:
        if not 0 <= token_id < len(self._spelled):
            return b"", state
        spelled = self._spelled[token_id]
        if not self._bilingual:
            return spelled, state
        return _join_word(spelled, self._words[token_id], state)

    def sentinel_id(self, index: int) -> int:
        return pick_sentinel(self._sentinels, index)

    def sentinel_index(self, token_id: int) -> int | None:
        return self._sentinel_indices.get(token_id)

    def _match(self, segment: str) -> list[int]:
        if len(segment) > MAX_SEGMENT_CHARS:
            return [self._unknown_id]
        ids = []
        start = 0
        while start < len(segment):
            token_id, end = self._match_longest(segment, start)
            ids.append(token_id)
            start = end
        return ids

    def _match_longest(self, segment: str, start: int) -> tuple[int, int]:
        """Id of the longest token at `start` and where it ends; unknown and one further if none."""
        for end in range(min(len(segment), start + self._longest), start, -1):
            token_id = self._look_up(segment[start:end], is_inside=start > 0)
            if token_id is not None:
                return token_id, end
        return self._unknown_id, start + 1

    def _look_up(self, text: str, *, is_inside: bool) -> int | None:
        if not self._bilingual or text == SPACE_MARK or _has_chinese(text):
            return self._ids.get(text)
        if is_inside:
            return self._ids.get(PIECE_PREFIX + text)
        # A typed "###" must not be taken for the piece that continues a word with "#".
        return None if _is_piece(text) else self._ids.get(text)

    def _drop_spaces(self, ids: list[int]) -> list[int]:
        """Leave out each space between two tokens of which neither is Chinese nor a space.

        Example: [I, space, love, space, 12] is left as [I, love, 12].
        """
        foreign = (Word.ENGLISH, Word.PIECE)
        return [
            token_id
            for i, token_id in enumerate(ids)
            if token_id != self._space_id
            or not 0 < i < len(ids) - 1
            or self._words[ids[i - 1]] not in foreign
            or self._words[ids[i + 1]] not in foreign
        ]


def _join_word(spelled: bytes, word: Word, last: int) -> tuple[bytes, Word]:
    """Bytes that a token adds after a word of kind `last`, and the kind of the word it leaves.

    A space mark counts as Chinese, but no longer once a piece is glued to it: then the space
    between two words that are not Chinese is due before it as well. Both spell " ", so to add the
    second one late comes to the same text: "a", mark, "##b" is "a" + " " + " b".
    """
    if word == Word.SPACE:
        return spelled, Word.SPACE_AFTER_ENGLISH if last == Word.ENGLISH else Word.SPACE
    if word != Word.PIECE:
        return (b" " if word == last == Word.ENGLISH else b"") + spelled, word
    if last == Word.NONE:  # a text that opens with a piece shows its prefix, as the original does
        return PIECE_PREFIX.encode() + spelled, Word.ENGLISH
    glue = b" " if last == Word.SPACE_AFTER_ENGLISH else b""
    return glue + spelled, Word.CHINESE if last == Word.CHINESE else Word.ENGLISH


def _classify(token: str) -> Word:
    if token == SPACE_MARK:
        return Word.SPACE
    if _is_piece(token):
        return Word.PIECE
    return Word.CHINESE if _has_chinese(token) else Word.ENGLISH


def _spell_token(token: str, bilingual: bool) -> bytes:
    if bilingual and _is_piece(token):
        token = token.removeprefix(PIECE_PREFIX)
    return token.translate(MARKS_TO_TEXT).encode("utf-8")


def _has_chinese(text: str) -> bool:
    return any("\u4e00" <= char <= "\u9fff" for char in text)


def _is_piece(token: str) -> bool:
    return len(token) > len(PIECE_PREFIX) and token.startswith(PIECE_PREFIX)


def _find_sentinels(ids: dict[str, int]) -> list[int]:
    found: list[int] = []
    while (token_id := ids.get(f"<s_{len(found)}>")) is not None:
        found.append(token_id)
    return found


def open_cpm2(path: Path, *, bilingual: bool, legacy_duplicate: bool = False) -> Cpm2Tokenizer:
    """Open a `vocab.txt` of CPM-2 and jieba's dictionary.

    Raises TokenizerError if the file cannot be read, is damaged or belongs to the other mode.
    """
    tokens = read_vocabulary(path)
    _check_vocabulary(path, tokens, bilingual)
    return Cpm2Tokenizer(
        tokens, load_segmenter(), bilingual=bilingual, legacy_duplicate=legacy_duplicate
    )


def read_vocabulary(path: Path) -> list[str]:
    """Tokens of a vocabulary file, one a line: the id of a token is its line number, from 0.

    Raises TokenizerError, with the line from 1, if one is empty, occurs twice or is not UTF-8.
    """
    try:
        lines = path.read_bytes().split(b"\n")  # str.splitlines would also cut at U+2028 and others
    except OSError as error:
        raise TokenizerError(f"{path}: the vocabulary cannot be read: {error}") from error
    if not lines[-1]:  # the newline after the last line; released files come with and without
        lines.pop()
    first_line: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        try:
            token = line.decode("utf-8").strip()  # the original strips too, and so accepts CR LF
        except UnicodeDecodeError as error:
            raise TokenizerError(f"{path}:{number}: {line!r} is not UTF-8") from error
        if not token:
            raise TokenizerError(f"{path}:{number}: blank line; each line must hold one token")
        if token in first_line:
            first = first_line[token]
            raise TokenizerError(f"{path}:{number}: {token!r} is on line {first} already")
        first_line[token] = number
    return list(first_line)


def _check_vocabulary(path: Path, tokens: list[str], bilingual: bool) -> None:
    ids = {token: token_id for token_id, token in enumerate(tokens)}
    if missing := [token for token in NEEDED_TOKENS if token not in ids]:
        raise TokenizerError(f"{path}: no {', '.join(missing)}; this is no vocabulary of CPM-2")
    num_sentinels = len(_find_sentinels(ids))
    for number, token in enumerate(tokens, 1):
        index = token.removeprefix("<s_").removesuffix(">")
        if token == f"<s_{index}>" and index.isdecimal() and int(index) >= num_sentinels:
            raise TokenizerError(f"{path}:{number}: {token} without <s_{num_sentinels}> before it")
    if not num_sentinels:
        raise TokenizerError(f"{path}: no sentinels; <s_0>, <s_1>, ... are needed to mark blanks")
    # The released files name the same words with ids one apart: the wrong mode yields nonsense.
    if any(map(_is_piece, tokens)) != bilingual:
        found, wanted = ("none", "cpm2_zh") if bilingual else ("some", "cpm2_zh_en")
        raise TokenizerError(f'{path}: {found} of the tokens start with "##"; use kind {wanted}')


_first_load = threading.Lock()


def load_segmenter() -> Segmenter:
    """Segment with jieba's default dictionary; built once for the process, in 0.4 s.

    It may be called, and the result used, from several threads.
    """
    with _first_load:  # one copy is 100 MB, and the warning filters below are the process's
        return _build_segmenter()


@functools.cache
def _build_segmenter() -> Segmenter:
    with warnings.catch_warnings():
        # jieba 0.42.1 has invalid escapes in its patterns, reported when it is compiled, and may
        # import the deprecated pkg_resources; under -W error either would be the end.
        warnings.simplefilter("ignore")
        import jieba
    # An instance of our own: words that others add to the module's default one would change ids.
    tokenizer = jieba.Tokenizer()
    # Not `initialize`: it logs to stderr, and is 0.2 s faster only by loading "jieba.cache", a dump
    # of marshal, from the shared temporary directory, where another user may have put his own.
    tokenizer.FREQ, tokenizer.total = tokenizer.gen_pfdict(tokenizer.get_dict_file())
    tokenizer.initialized = True
    cut: Segmenter = tokenizer.cut
    return cut
