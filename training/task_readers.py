"""From texts to token ids, as the two kinds of models are to have them.

An encoder-decoder reads a text and answers in a row of its own; a decoder-only model goes on in
the same.
"""

from collections.abc import Callable
from typing import Protocol

from engine.config import ModelConfig
from engine.tokenizer import Tokenizer

Ids = tuple[int, ...]
ANCHOR = "\n"  # no vocabulary joins it with what follows
BEFORE_SPACE = frozenset(".,:;!?)")


class Reader(Protocol):
    """Ids of texts, as the encoder and the decoder are to have them."""

    @property
    def is_decoder_only(self) -> bool:
        """Whether an answer goes on in the text that is read."""
        ...

    def close(self, text: str) -> list[int]:
        """Those of what the encoder reads, with what closes it, or begins it."""
        ...

    def follow(self, text: str) -> list[int]:
        """Those of what comes after a text."""
        ...

    def spell(self, text: str) -> list[int]:
        """As `follow`. Raises ValueError if there are none for some of it."""
        ...

    @property
    def closing(self) -> Ids:
        """What ends an answer; nothing where nobody is trained."""
        ...


class TokenReader:
    """Reads with the tokenizer of a model."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig) -> None:
        self._tokenizer = tokenizer
        self._config = config

    @property
    def closing(self) -> Ids:
        return (closing_id(self._tokenizer, self._config),)

    @property
    def is_decoder_only(self) -> bool:
        return self._config.is_decoder_only

    def close(self, text: str) -> list[int]:
        return encoder_ids(text, self._tokenizer, self._config)

    def follow(self, text: str) -> list[int]:
        encode = self._tokenizer.encode
        return inner_ids(encode, text) if self.is_decoder_only else encode(text)

    def spell(self, text: str) -> list[int]:
        ids = self.follow(text)
        if not ids or set(ids) & self._tokenizer.control_ids:
            raise ValueError(f"the tokenizer cannot spell {text[:40]!r}")
        return ids


def encoder_ids(text: str, tokenizer: Tokenizer, config: ModelConfig) -> list[int]:
    """Ids of a text with what closes it, as the server makes them of a prompt."""
    ids = tokenizer.encode(text)
    if config.is_decoder_only:
        begin = list(config.begin_token_ids)
        return ids if ids[: len(begin)] == begin else begin + ids
    if config.continuation_sentinel is None:
        return [*ids, *config.eos_token_ids[:1]]
    return [*ids, tokenizer.sentinel_id(config.continuation_sentinel)]


def decoder_start(tokenizer: Tokenizer, config: ModelConfig) -> Ids:
    """What the decoder reads before the answer, as the server gives it.

    Nothing of a decoder-only model: there it is the last token of each text.
    """
    if config.is_decoder_only:
        return ()
    start = [config.decoder_start_token_id]
    if config.continuation_sentinel is not None:
        start.append(tokenizer.sentinel_id(config.continuation_sentinel))
    return tuple(start)


def inner_ids(encode: Callable[[str], list[int]], text: str) -> list[int]:
    """Ids of what comes after other text, without what is put before the first word of one."""
    anchor, ids = encode(ANCHOR), encode(ANCHOR + text)
    return ids[len(anchor) :] if ids[: len(anchor)] == anchor else encode(text)


def needs_space(before: str, word: str) -> bool:
    """Whether a word that goes on in a text needs a space: as "good" does after "This is"."""
    last, first = before[-1:], word[:1]
    parts = (last.isascii() and last.isalnum()) or last in BEFORE_SPACE
    return parts and first.isascii() and first.isalnum()


def closing_id(tokenizer: Tokenizer, config: ModelConfig) -> int:
    """What ends an answer: CPM-2's second sentinel, otherwise the end mark.

    Source: CPM-2's fine-tuning code, whose targets are <s_0> answer <s_1>.
    """
    if config.continuation_sentinel == 0 or not config.eos_token_ids:
        return tokenizer.sentinel_id(1)
    return config.eos_token_ids[0]
