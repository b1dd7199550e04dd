"""Words that may never come: the rows of ids that spell them, and which id would complete one."""

from collections.abc import Iterable, Iterator, Sequence

from engine.errors import RequestError
from engine.tokenizer import Tokenizer, decode_ids

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
    Raises RequestError if a word is empty, or half a character.
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
    plain = tokenizer.decode(tokenizer.encode(word)).strip()  # tokenizers may change letters
    for context in CONTEXTS:
        ids = tokenizer.encode(context + word)
        if not tokenizer.control_ids.isdisjoint(ids):  # the unknown: it cannot be written at all
            continue
        for begin in range(len(ids) - 1, -1, -1):
            before, text = decode_ids(tokenizer, ids[:begin]), decode_ids(tokenizer, ids)
            if text == before + plain or text == f"{before} {plain}":
                yield tuple(ids[begin:])
                break
