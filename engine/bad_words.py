"""Words that may never come: the rows of ids that spell them, and which id would complete one."""

from collections.abc import Iterable, Iterator, Sequence

from engine.errors import RequestError
from engine.request import MAX_BAD_WORD_TOKENS
from engine.tokenizer import Tokenizer

# What may stand before a word: nothing, a space, a letter, a digit, a bracket, a Chinese word.
CONTEXTS = ("", " ", "a", "1", "(", "\u4e2d")


class BadWords:
    """Rows of ids of which none may be completed. Those of one id are banned outright."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        self.single_ids: list[int] = []
        self._by_last: dict[int, list[tuple[list[int], int]]] = {}
        for sequence in sequences:
            *begin, end = sequence
            if begin:
                self._by_last.setdefault(begin[-1], []).append((begin, end))
            else:
                self.single_ids.append(end)

    @property
    def is_changing(self) -> bool:
        """Whether what is banned depends on what stands before."""
        return bool(self._by_last)

    def ending_after(self, history: Sequence[int]) -> list[int]:
        """Ids that would complete a row of several after those ids."""
        begun = self._by_last.get(history[-1], ()) if history else ()
        return [end for begin, end in begun if list(history[-len(begin) :]) == begin]


def bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Rows of ids with which a tokenizer writes words: at the start, after a space, inside a text.

    A vocabulary may spell a word in many more ways than its tokenizer ever would; a model that is
    bent on it can still find one of those. Spaces around a word do not count.
    Raises RequestError if a word is empty, too long, or half a character.
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip():
            raise RequestError("bad_words holds an empty word; leave it out", "bad_words")
        try:
            found.update(dict.fromkeys(_spellings(word.strip(), tokenizer)))
        except ValueError as error:
            text = f"bad_words: {word[:100]!r} cannot be tokenized: {error}"
            raise RequestError(text, "bad_words") from error
    return tuple(ids for ids in found if not any(ids[i:] in found for i in range(1, len(ids))))


def _spellings(word: str, tokenizer: Tokenizer) -> Iterator[tuple[int, ...]]:
    written = tokenizer.encode(word)
    if len(written) > MAX_BAD_WORD_TOKENS:  # what follows takes the square of it
        raise ValueError(f"it has {len(written)} tokens; the limit is {MAX_BAD_WORD_TOKENS}")
    plain = tokenizer.decode(written).strip()  # tokenizers may change letters
    for context in CONTEXTS:
        ids = tokenizer.encode(context + word)
        if not tokenizer.control_ids.isdisjoint(ids):  # the unknown: it cannot be written at all
            continue
        parts = _spell_all(ids, tokenizer)
        text = _read(parts)
        for begin in range(len(ids) - 1, -1, -1):
            before = _read(parts[:begin])
            if text == before + plain or text == f"{before} {plain}":
                yield tuple(ids[begin:])
                break


def _spell_all(ids: Sequence[int], tokenizer: Tokenizer) -> list[bytes]:
    """What each id adds to the text."""
    parts, state = [], 0
    for token_id in ids:
        spelled, state = tokenizer.spell(token_id, state)
        parts.append(spelled)
    return parts


def _read(parts: Sequence[bytes]) -> str:
    return b"".join(parts).decode("utf-8", "replace")
