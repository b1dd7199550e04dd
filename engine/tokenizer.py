"""What every tokenizer offers, the byte tokenizer, and how that of a model directory is opened."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from engine.config import TokenizerKind
from engine.model_paths import find_gguf


class Tokenizer(Protocol):
    """Text to ids and back.

    Special tokens typed in a text are text, never control ids; but not so those of a
    `tokenizer.json`, whose chat templates write them.
    """

    @property
    def vocab_size(self) -> int:
        """Number of ids that the vocabulary names, sentinels included."""
        ...

    @property
    def num_sentinels(self) -> int:
        """Number of sentinels (`<s_0>`, `<extra_id_0>`, ...)."""
        ...

    @property
    def control_ids(self) -> frozenset[int]:
        """Ids that stand for no text: the unknown, padding, marks; sentinels not counted."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without start or end marks.

        Raises ValueError for half a surrogate pair, unless the vocabulary has an id for the unknown
        that takes it.
        """
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; bytes that form no character become U+FFFD.

        An id that the vocabulary does not name adds nothing: embedding tables are often padded.
        """
        ...

    def spell(self, token_id: int, state: int) -> tuple[bytes, int]:
        """UTF-8 bytes that one more id adds to a text, and the state to hand in with the next id.

        The state is 0 before the first id and means something to its own tokenizer only. Joined
        and read as UTF-8, what a row of ids spells is what `decode` gives; `Detokenizer` needs it.
        """
        ...

    def sentinel_id(self, index: int) -> int:
        """Id of a sentinel; negative indices count from the last.

        Raises ValueError if there is none.
        """
        ...

    def sentinel_index(self, token_id: int) -> int | None:
        """Index of the sentinel that an id is, or None."""
        ...


def decode_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ids, from what the tokenizer spells for each of them."""
    state = 0
    parts = []
    for token_id in ids:
        spelled, state = tokenizer.spell(token_id, state)
        parts.append(spelled)
    return b"".join(parts).decode("utf-8", "replace")


def pick_sentinel(sentinel_ids: Sequence[int], index: int) -> int:
    """Id at an index, from the end if it is negative. Raises ValueError if there is none."""
    count = len(sentinel_ids)
    if not -count <= index < count:
        allowed = f"allowed: {-count} to {count - 1}" if count else "this vocabulary has none"
        raise ValueError(f"there is no sentinel {index}; {allowed}")
    return sentinel_ids[index]


class ByteTokenizer:
    """UTF-8 bytes as ids; it needs no file, and suits tests and tiny models.

    Ids: 0 padding, 1 end, 2 unknown, then the byte b as 3 + b, then the sentinels 259 .. 383. The
    decoder start is the model's affair (`decoder_start_token_id`, usually 0).
    Example: "A" is [68], and sentinel 1 is 260.

    Source: ByT5 (arXiv:2105.13626) s3.1; sentinels in rising order as in its Hugging Face port.
    """

    first_byte = 3
    first_sentinel = first_byte + 256
    num_sentinels = 125
    vocab_size = first_sentinel + num_sentinels
    control_ids = frozenset(range(first_byte))

    def encode(self, text: str) -> list[int]:
        return [self.first_byte + byte for byte in text.encode("utf-8")]

    def decode(self, ids: Sequence[int]) -> str:
        return decode_ids(self, ids)

    def spell(self, token_id: int, state: int) -> tuple[bytes, int]:
        if self.first_byte <= token_id < self.first_sentinel:
            return bytes((token_id - self.first_byte,)), state
        index = self.sentinel_index(token_id)
        return b"" if index is None else f"<extra_id_{index}>".encode(), state

    def sentinel_id(self, index: int) -> int:
        return pick_sentinel(range(self.first_sentinel, self.vocab_size), index)

    def sentinel_index(self, token_id: int) -> int | None:
        index = token_id - self.first_sentinel
        return index if 0 <= index < self.num_sentinels else None


def open_tokenizer(directory: Path, kind: TokenizerKind) -> Tokenizer:
    """Open the tokenizer files of a model directory.

    The CPM-2 kinds read `vocab.txt`, sentencepiece reads `spiece.model`, tokenizer_json the file of
    that name or what a GGUF file describes, cpm1 `chinese_vocab.model`, bytes nothing.
    Raises TokenizerError if a file is missing, damaged or of another kind.
    """
    # Imported here so that this module, which everybody imports for its protocol, stays light.
    if kind == "bytes":
        return ByteTokenizer()
    if kind == "sentencepiece":
        from engine.tokenizer_sentencepiece import open_sentencepiece

        return open_sentencepiece(directory / "spiece.model")
    if kind == "tokenizer_json":
        if (file := find_gguf(directory)) is not None:
            from engine.checkpoint_gguf import open_gguf_tokenizer

            return open_gguf_tokenizer(file)
        from engine.tokenizer_json import TOKENIZER_JSON, open_json

        return open_json(directory / TOKENIZER_JSON)
    if kind == "cpm1":
        from engine.tokenizer_sentencepiece import open_cpm1

        return open_cpm1(directory / "chinese_vocab.model")
    from engine.tokenizer_cpm2 import open_cpm2

    return open_cpm2(directory / "vocab.txt", bilingual=kind == "cpm2_zh_en")
