"""Ids to text while they are generated: whole characters only, and nothing of a stop string."""

import codecs
from collections.abc import Sequence

from engine.tokenizer import Tokenizer


class Detokenizer:
    """Turns ids into text one by one; joined, the pieces are what `Tokenizer.decode` gives.

    Each id costs the same, however long the text. What is returned is final: bytes that may yet
    become a character wait for the next id or for `flush`. `before` are ids whose text was told
    already, and which this one goes on from.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self.state = 0  # of the tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token_id in before:
            self.push(token_id)

    def push(self, token_id: int) -> str:
        """Text that this id completes; empty if none is."""
        spelled, self.state = self._tokenizer.spell(token_id, self.state)
        return self._utf8.decode(spelled)

    def flush(self) -> str:
        """End the text: U+FFFD if half a character is left. The next `push` begins a new text."""
        rest = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self.state = 0
        return rest


class StopMatcher:
    """Passes text on up to the first stop string, of which it never shows any part.

    If the stop string `is_shown`, the text goes on to its end, and nothing need be held back.

    The stop string that is complete first ends the text, as if each character came alone, so how
    the text is cut into pieces changes nothing; of two complete at once the longer one counts. With
    stops "cd" and "bcde", "abcde" gives "ab" and `matched` "cd".

    Source: Knuth, Morris, Pratt, Fast pattern matching in strings (1977), one automaton per string.
    """

    def __init__(self, stops: Sequence[str], *, is_shown: bool = False) -> None:
        if "" in stops:
            raise ValueError("a stop string is empty; it would end every text before its beginning")
        self._stops = [(stop, _borders(stop)) for stop in dict.fromkeys(stops)]
        self._lengths = [0] * len(self._stops)  # how much of each stop the text ends with
        self._held = ""
        self._is_shown = is_shown
        self.matched: str | None = None

    def push(self, text: str) -> str:
        """Text that may be shown now; after a match there is none any more."""
        if self.matched is not None:
            return ""
        start = len(self._held)
        self._held += text
        for end, char in enumerate(text, start + 1):
            self.matched = self._advance(char)
            if self.matched is not None:
                shown = self._held[: end if self._is_shown else end - len(self.matched)]
                self._held = ""
                return shown
        begun = 0 if self._is_shown else max(self._lengths, default=0)
        safe = len(self._held) - begun
        shown, self._held = self._held[:safe], self._held[safe:]
        return shown

    def flush(self) -> str:
        """End the text: what was held back and became no stop string."""
        rest, self._held = self._held, ""
        self._lengths = [0] * len(self._stops)
        return rest

    def _advance(self, char: str) -> str | None:
        """Take one character into every automaton; the longest stop that it completes."""
        complete: str | None = None
        for i, (stop, borders) in enumerate(self._stops):
            length = self._lengths[i]
            while length and stop[length] != char:
                length = borders[length]
            length += stop[length] == char
            self._lengths[i] = length
            if length == len(stop) and (complete is None or length > len(complete)):
                complete = stop
        return complete


def _borders(stop: str) -> list[int]:
    """For each length, the longest proper start of those characters that also ends them.

    Example: "abab" gives [0, 0, 0, 1, 2]: "abab" both starts and ends with "ab".
    """
    borders = [0, 0]
    length = 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = borders[length]
        length += stop[length] == char
        borders.append(length)
    return borders
