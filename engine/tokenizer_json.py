"""Tokenizers that come as a `tokenizer.json`: byte-level BPE, or pieces with a mark for spaces."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from engine.errors import TokenizerError
from engine.tokenizer import decode_ids, pick_sentinel

TOKENIZER_JSON = "tokenizer.json"
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
STEPS = "ByteLevel, Metaspace, Replace (of a string), ByteFallback, Fuse, Strip (of a first space)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How the pieces of a vocabulary spell text, as the file's decoder says.

    `is_byte_level`: each letter of a piece stands for a byte. `replaced`: what is written otherwise
    in pieces, such as the mark for a space. `has_byte_pieces`: `<0xE4>` is a byte. `skipped`: what
    the first piece of a text is told without: nothing, its first space ("space"), or all of its
    marks ("marks", those of the last replacement).
    """

    is_byte_level: bool = False
    replaced: tuple[tuple[str, str], ...] = ()
    has_byte_pieces: bool = False
    skipped: str = ""

    def spell(self, piece: str) -> bytes:
        """The bytes of a piece inside a text."""
        if self.is_byte_level and all(letter in BYTE_OF_LETTER for letter in piece):
            return bytes(BYTE_OF_LETTER[letter] for letter in piece)
        for mark, text in self.replaced:
            piece = piece.replace(mark, text)
        match = BYTE_PIECE.fullmatch(piece) if self.has_byte_pieces else None
        return bytes((int(match[1], 16),)) if match else piece.encode("utf-8")

    def spell_first(self, piece: str) -> bytes:
        """The bytes of a piece that begins a text."""
        if self.skipped == "marks":
            return self.spell(piece.replace(self.replaced[-1][0], ""))
        spelled = self.spell(piece)
        return spelled.removeprefix(b" ") if self.skipped == "space" else spelled


class JsonTokenizer:
    """The tokenizer of a `tokenizer.json`, run by the library that wrote it.

    Unlike the other vocabularies, and as everybody who serves such models does, special tokens that
    are typed in a text become their ids: chat templates write them so. `mark_texts` are those, for
    who must keep what a user types from being one. No sentinels. Decoding says
    nothing for special tokens. Runs of bytes that are no UTF-8 become U+FFFD as Python has it; the
    library writes one for each byte in a vocabulary with byte pieces.

    Source: GPT-2 for bytes as letters; SentencePiece (arXiv:1808.06226) for the mark and `<0xE4>`.
    """

    num_sentinels = 0

    def __init__(self, tokenizer: tokenizers.Tokenizer, spelling: Spelling) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.control_ids = frozenset(i for i, token in added.items() if token.special)
        self.mark_texts = tuple(token.content for token in added.values() if token.special)
        pieces = {i: piece for piece, i in tokenizer.get_vocab(with_added_tokens=True).items()}
        self._spelled = [b""] * (max(pieces, default=-1) + 1)
        self._first = self._spelled.copy()
        for token_id, piece in pieces.items():
            if token_id in self.control_ids:
                continue
            is_text = spelling.is_byte_level and token_id in added  # their letters are no bytes
            self._spelled[token_id] = piece.encode() if is_text else spelling.spell(piece)
            self._first[token_id] = piece.encode() if is_text else spelling.spell_first(piece)

    @property
    def vocab_size(self) -> int:
        return len(self._spelled)

    def encode(self, text: str) -> list[int]:
        text.encode("utf-8")  # half a surrogate pair is a ValueError here, a TypeError there
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return decode_ids(self, ids)

    def spell(self, token_id: int, state: int) -> tuple[bytes, int]:
        # State 0: no text yet, so a leading space may be the one that encoding puts before a text.
        if not 0 <= token_id < len(self._spelled):
            return b"", state
        spelled = self._spelled[token_id]
        return (spelled if state else self._first[token_id]), state or int(bool(spelled))

    def sentinel_id(self, index: int) -> int:
        return pick_sentinel((), index)

    def sentinel_index(self, token_id: int) -> int | None:  # noqa: ARG002 -- the protocol has it
        return None


def open_json(path: Path) -> JsonTokenizer:
    """Open a `tokenizer.json`.

    Raises TokenizerError if it cannot be read, is damaged, or of a kind that is not supported.
    """
    return make_json_tokenizer(str(path), read_text(path))


def make_json_tokenizer(where: str, text: str) -> JsonTokenizer:
    """The tokenizer of the content of a `tokenizer.json`; `where` names it in errors.

    Raises TokenizerError if it is damaged, or of a kind that is not supported.
    """
    tokenizer = _parse(where, text)
    try:
        spelling = _read_spelling(tokenizer)
    except TokenizerError as error:
        raise TokenizerError(f"{where}: {error}") from error
    return JsonTokenizer(tokenizer, spelling)


def begin_ids(path: Path) -> tuple[int, ...]:
    """Ids that a `tokenizer.json` puts before every text, such as a mark of its beginning.

    Raises TokenizerError if it cannot be read or is damaged.
    """
    encoding = _parse(str(path), read_text(path)).encode("a")
    marks = encoding.special_tokens_mask
    return tuple(encoding.ids[: marks.index(0) if 0 in marks else 0])


def read_text(path: Path) -> str:
    """Text of a tokenizer's file. Raises TokenizerError if it cannot be read or is no UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise TokenizerError(f"{path}: the tokenizer cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise TokenizerError(f"{path}: is not UTF-8; copy or download it again") from error


def _parse(where: str, text: str) -> tokenizers.Tokenizer:
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(
            f"{where}: is no tokenizer.json, or a damaged one ({error}); copy or download it again"
        ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _read_spelling(tokenizer: tokenizers.Tokenizer) -> Spelling:
    """What the decoder does, as bytes of pieces. Raises TokenizerError if those cannot tell."""
    if tokenizer.decoder is None:
        raise TokenizerError(f"has no decoder; supported are those made of {STEPS}")
    values = json.loads(tokenizer.decoder.__getstate__())
    steps = values["decoders"] if values["type"] == "Sequence" else [values]
    is_byte_level = has_byte_pieces = is_fused = False
    replaced: list[tuple[str, str]] = []
    skipped = ""
    for step in steps:
        match step["type"]:
            case "ByteLevel":
                is_byte_level = True
            case "ByteFallback":
                has_byte_pieces = True
            case "Fuse":
                is_fused = True
            case "Metaspace":
                replaced.append((step["replacement"], " "))
                skipped = "" if step["prepend_scheme"] == "never" else "marks"
            case "Replace" if isinstance(mark := step["pattern"].get("String"), str):
                replaced.append((mark, step["content"]))
            case "Strip" if is_fused and _strip(step) == (" ", 1, 0):
                skipped = "space"
            case _:
                raise TokenizerError(
                    f"has the decoder {json.dumps(step)}; supported are those made of {STEPS}"
                )
    return Spelling(
        is_byte_level=is_byte_level,
        replaced=tuple(replaced),
        has_byte_pieces=has_byte_pieces,
        skipped=skipped,
    )


def _strip(step: Mapping[str, object]) -> tuple[object, object, object]:
    return step["content"], step["start"], step["stop"]


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level vocabularies, as GPT-2 chose them.

    A byte that prints in Latin-1 stands for itself; the others are U+0100 and so on, in order.
    Example: "\u0120" is a space, the 33rd of the others.
    """
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {chr(byte): byte for byte in printed}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


BYTE_OF_LETTER = _byte_letters()
