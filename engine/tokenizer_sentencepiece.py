"""SentencePiece tokenizers: T5 and mT5 as they are, CPM-1 with jieba's segments before it."""

import re
from collections.abc import Sequence
from pathlib import Path

from sentencepiece import SentencePieceProcessor

from engine.errors import TokenizerError
from engine.tokenizer import decode_ids, pick_sentinel
from engine.tokenizer_cpm2 import (
    CONTROL_TOKENS,
    MARKS_TO_TEXT,
    TEXT_TO_MARKS,
    Segmenter,
    load_segmenter,
)

NUM_APPENDED_SENTINELS = 100
SPACE = "\u2581"
UNKNOWN_TEXT = " \u2047 "  # what SentencePiece itself writes for the unknown piece
SENTINEL_PIECE = re.compile(rf"{SPACE}?<extra_id_(\d+)>")


class SentencePieceTokenizer:
    """The pieces of a SentencePiece model and its sentinels, `<extra_id_0>` having the highest id.

    mT5's model holds its sentinels as pieces. T5's does not; there 100 follow after the last piece,
    so that with 32000 pieces sentinel 0 is 32099 and sentinel 99 is 32000. Padding and end marks
    decode to nothing, sentinels to their names, bytes (`<0xE4>`) to what they form together.

    Source: T5 (arXiv:1910.10683) s3.1.4; mT5 (arXiv:2010.11934); SentencePiece (arXiv:1808.06226).
    """

    def __init__(self, processor: SentencePieceProcessor) -> None:
        self._processor = processor
        self._num_pieces = processor.get_piece_size()
        own = _find_sentinels(processor)
        last = self._num_pieces + NUM_APPENDED_SENTINELS - 1
        self._sentinels = own or [last - i for i in range(NUM_APPENDED_SENTINELS)]
        self._sentinel_indices = {token_id: i for i, token_id in enumerate(self._sentinels)}
        self.control_ids = _find_controls(processor)
        # SentencePiece finds sentinels that are pieces in typed text too; those are spelled out.
        self._typed = {token_id: _letters(processor, token_id) for token_id in own}

    @property
    def vocab_size(self) -> int:
        return max(self._num_pieces, self._sentinels[0] + 1)

    @property
    def num_sentinels(self) -> int:
        return len(self._sentinels)

    def encode(self, text: str) -> list[int]:
        # As bytes, so that half a surrogate pair is a ValueError and not an error of the binding.
        ids: list[int] = self._processor.encode(text.encode("utf-8"))
        return [i for token_id in ids for i in self._typed.get(token_id, (token_id,))]

    def decode(self, ids: Sequence[int]) -> str:
        return decode_ids(self, ids)

    def spell(self, token_id: int, state: int) -> tuple[bytes, int]:
        # State 0: no text yet, so a leading space is the one that encoding puts before a text.
        spelled = self._spell_piece(token_id)
        if state == 0 and spelled.startswith(SPACE.encode()):
            spelled = spelled.removeprefix(SPACE.encode())
        return spelled.replace(SPACE.encode(), b" "), state or int(bool(spelled))

    def sentinel_id(self, index: int) -> int:
        return pick_sentinel(self._sentinels, index)

    def sentinel_index(self, token_id: int) -> int | None:
        return self._sentinel_indices.get(token_id)

    def _spell_piece(self, token_id: int) -> bytes:
        if 0 <= token_id < self._num_pieces:
            return _spell_piece(self._processor, token_id)
        index = self.sentinel_index(token_id)
        return b"" if index is None else f"<extra_id_{index}>".encode()


class Cpm1Tokenizer:
    """The tokenizer of CPM-1: jieba's segments joined by blanks, then SentencePiece.

    Spaces and newlines of the text become U+2582 and U+2583 first; blanks of the pieces mean
    nothing. No sentinels: CPM-1 is a decoder.

    Source: CPM-1 (arXiv:2012.00413) and its published generation code.
    """

    num_sentinels = 0

    def __init__(self, processor: SentencePieceProcessor, segment: Segmenter) -> None:
        self._processor = processor
        self._segment = segment
        # pieces like all others in the released model; jieba cuts them up where they are typed
        named = {processor.piece_to_id(mark) for mark in CONTROL_TOKENS}
        self.control_ids = _find_controls(processor) | named

    @property
    def vocab_size(self) -> int:
        return self._processor.get_piece_size()

    def encode(self, text: str) -> list[int]:
        segments = (segment.translate(TEXT_TO_MARKS) for segment in self._segment(text))
        ids: list[int] = self._processor.encode(" ".join(segments).encode("utf-8"))
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return decode_ids(self, ids)

    def spell(self, token_id: int, state: int) -> tuple[bytes, int]:
        if not 0 <= token_id < self.vocab_size:
            return b"", state
        spelled = _spell_piece(self._processor, token_id)
        if self._processor.is_byte(token_id):
            return spelled, state
        text = spelled.decode("utf-8").replace(SPACE, "").replace(" ", "")
        return text.translate(MARKS_TO_TEXT).encode("utf-8"), state

    def sentinel_id(self, index: int) -> int:
        return pick_sentinel((), index)

    def sentinel_index(self, token_id: int) -> int | None:  # noqa: ARG002 -- the protocol has it
        return None


def _spell_piece(processor: SentencePieceProcessor, token_id: int) -> bytes:
    if processor.is_control(token_id):
        return b""
    if processor.is_unknown(token_id):
        return UNKNOWN_TEXT.encode("utf-8")
    piece = processor.id_to_piece(token_id)
    if processor.is_byte(token_id):
        return bytes((int(piece[1:-1], 16),))  # "<0xE4>"
    return piece.encode("utf-8")


def _find_sentinels(processor: SentencePieceProcessor) -> list[int]:
    """Ids of the pieces that are sentinels, in the order of their numbers."""
    pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
    matches = ((token_id, SENTINEL_PIECE.fullmatch(piece)) for token_id, piece in enumerate(pieces))
    found = {int(match[1]): token_id for token_id, match in matches if match}
    if missing := [i for i in range(len(found)) if i not in found]:
        raise TokenizerError(
            f"the model holds {len(found)} sentinels but no <extra_id_{missing[0]}>; they must run "
            "from <extra_id_0> without a gap"
        )
    return [found[i] for i in range(len(found))]


def _find_controls(processor: SentencePieceProcessor) -> frozenset[int]:
    """Ids of the pieces that stand for no text."""
    pieces = range(processor.get_piece_size())
    return frozenset(i for i in pieces if processor.is_control(i) or processor.is_unknown(i))


def _letters(processor: SentencePieceProcessor, token_id: int) -> list[int]:
    """Ids that spell out a piece letter by letter, in bytes where the model has no such letter."""
    letters = processor.id_to_piece(token_id)
    ids = processor.piece_to_id(list(letters))
    return [
        processor.piece_to_id(f"<0x{ord(letter):02X}>") if i == processor.unk_id() else i
        for letter, i in zip(letters, ids, strict=True)
    ]


def load_model(path: Path) -> SentencePieceProcessor:
    """Load a SentencePiece model. Raises TokenizerError if it cannot be read or is none."""
    processor = SentencePieceProcessor()
    try:
        # Not the constructor's `model_proto`: for an empty file it yields a processor of 0 pieces.
        processor.load_from_serialized_proto(path.read_bytes())
    except OSError as error:
        raise TokenizerError(f"{path}: the SentencePiece model cannot be read: {error}") from error
    except RuntimeError as error:
        raise TokenizerError(f"{path}: not a SentencePiece model: {error}") from error
    return processor


def open_sentencepiece(path: Path) -> SentencePieceTokenizer:
    """Open a `spiece.model` of T5 or mT5.

    Raises TokenizerError if it cannot be read or is damaged.
    """
    processor = load_model(path)
    try:
        return SentencePieceTokenizer(processor)
    except TokenizerError as error:
        raise TokenizerError(f"{path}: {error}") from error


def open_cpm1(path: Path) -> Cpm1Tokenizer:
    """Open a `chinese_vocab.model` of CPM-1.

    Raises TokenizerError if it cannot be read or is none.
    """
    return Cpm1Tokenizer(load_model(path), load_segmenter())
