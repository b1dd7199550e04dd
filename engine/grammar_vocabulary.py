"""A tokenizer as llguidance wants one: each token has one spelling, whatever stands before it.

Ours spell some tokens in several ways (a word with the space before it, or without at the start of
a text), so each spelling gets an id of its own here, and a table for each state of the tokenizer
tells which spelling a token has. Letters: V tokens of the tokenizer, U spellings.
"""

import functools
from collections.abc import Sequence

import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from engine.tokenizer import Tokenizer

MARKER = 0xFF  # begins llguidance's special tokens; no UTF-8 text holds it


class _Spellings:
    """What llguidance's wrapper asks for; the last id is the end of the text."""

    bos_token_id = None

    def __init__(self, spelled: Sequence[bytes]) -> None:
        self.tokens = [*spelled, b"<end>"]
        self.eos_token_id = len(spelled)
        self.special_token_ids = [len(spelled)]

    def __call__(self, text: bytes) -> list[int]:  # noqa: ARG002 -- so it is called
        """Tokenize what a grammar forces: nothing, all grammars here have forcing off."""
        return []


class GrammarVocabulary:
    """The spellings of a tokenizer, and which of them each token has in each of its states."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        ids: dict[bytes, int] = {}
        self._spelling_V: dict[int, NDArray[np.int64]] = {}
        unread = {0}
        while unread:
            state = unread.pop()
            self._spelling_V[state], reached = self._read(state, ids)
            unread |= reached - self._spelling_V.keys()
        spellings = TokenizerWrapper(_Spellings(list(ids)))
        self.llguidance = LLTokenizer(spellings, n_vocab=len(ids) + 1, eos_token=len(ids))

    def _read(self, state: int, ids: dict[bytes, int]) -> tuple[NDArray[np.int64], set[int]]:
        """Spelling of each token in a state, -1 if it has none; and the states they lead to."""
        tokenizer = self._tokenizer
        spelling_V = np.full(tokenizer.vocab_size, -1, dtype=np.int64)
        reached = set()
        for token_id in range(tokenizer.vocab_size):
            spelled, after = tokenizer.spell(token_id, state)
            reached.add(after)
            is_mark = tokenizer.sentinel_index(token_id) is not None
            if token_id in tokenizer.control_ids or is_mark or not spelled or MARKER in spelled:
                continue
            spelling_V[token_id] = ids.setdefault(spelled, len(ids))
        return spelling_V, reached

    def spelling(self, token_id: int, state: int) -> tuple[int, int]:
        """Spelling of a token in a state, -1 if it has none, and the state after it."""
        _, after = self._tokenizer.spell(token_id, state)
        spelling_V = self._spelling_V[state]
        return (int(spelling_V[token_id]) if 0 <= token_id < len(spelling_V) else -1), after

    def spread(self, bitmask_U: bytes, state: int) -> NDArray[np.bool_]:
        """Which tokens (V,) have one of the spellings that a bit mask allows."""
        allowed_U = np.unpackbits(np.frombuffer(bitmask_U, np.uint8), bitorder="little")
        allowed_U[-1] = 0  # the end, or nothing: no spelling, so what has none, -1, looks there
        return allowed_U[self._spelling_V[state]].view(np.bool_)


@functools.lru_cache(maxsize=4)
def grammar_vocabulary(tokenizer: Tokenizer) -> GrammarVocabulary:
    """The vocabulary of a tokenizer, built once: that takes up to a second for 250,000 tokens."""
    return GrammarVocabulary(tokenizer)
