"""Marks that somebody types in a message: text like any other, never a mark of the chat.

A `tokenizer.json` reads marks wherever they stand, those that a template writes and those that a
user does. So what may begin a mark in a message is covered by another character while the template
runs; then it is put back, and where it begins a mark indeed, the text is cut behind it: neither
"<" nor "|im_start|>" is one. All other texts are encoded as they are.

A template may look into a message, so little of it is covered: the head of each mark. It may also
put a mark together, by taking out what stands in it. So it runs once more on messages in which each
"<" is covered; where marks come out that do not come then, that second text is taken.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache

HEAD_CHARS = 3  # so much of a mark is taken for one: the rest may come from the next message
COVERS = range(0xF0000, 0xF4000)  # of private use: no template asks for these

Encode = Callable[[str], list[int]]
Cover = Callable[[str], str]


@dataclass(frozen=True, slots=True)
class Marks:
    """The marks of a vocabulary, and what finds the first character of what may be one."""

    texts: frozenset[str]
    lengths: tuple[int, ...]
    firsts: str
    pattern: re.Pattern[str]

    def begins_at(self, text: str, place: int) -> bool:
        """Whether one stands there; of a thousand marks few differ in length."""
        return any(text[place : place + length] in self.texts for length in self.lengths)

    def find_all(self, text: str) -> list[str]:
        """All that stand in a text, in their order; of two at one place the longer."""
        found = []
        for match in re.finditer("|".join(map(re.escape, self.firsts)), text):
            begin = match.start()
            ones = (text[begin : begin + length] for length in reversed(self.lengths))
            found += [one for one in ones if one in self.texts][:1]
        return found


@lru_cache(maxsize=8)
def read_marks(texts: tuple[str, ...]) -> Marks | None:
    """Make ready to look for marks; None if there is none."""
    known = frozenset(text for text in texts if text.strip())
    if not known:
        return None
    lengths = tuple(sorted(set(map(len, known))))
    firsts = "".join(sorted({text[0] for text in known}))
    pattern = re.compile("|".join(_pattern(first, known) for first in firsts))
    return Marks(known, lengths, firsts, pattern)


def _pattern(first: str, texts: Collection[str]) -> str:
    """Finds a character if the head of a mark follows, or less of one and then the end."""
    rests = {text[1:HEAD_CHARS] for text in texts if text[0] == first}
    heads = "|".join(map(re.escape, sorted(rests)))
    begun = {rest[:count] for rest in rests for count in range(len(rest))}
    tails = "|".join(map(re.escape, sorted(begun)))
    ending = rf"|(?:{tails})\s*+\Z" if begun else ""
    return f"{re.escape(first)}(?=(?:{heads}){ending})"


class Shield:
    """Covers the marks in the texts of one conversation, and encodes what a template made of it."""

    def __init__(self, marks: Marks, texts: Collection[str]) -> None:
        self._marks = marks
        used = set().union(*texts)
        # one that stands for itself as well would do no harm but to its own text
        free = [chr(code) for code in COVERS if chr(code) not in used]
        free += [chr(COVERS[0])] * len(marks.firsts)
        self._covers = dict(zip(marks.firsts, free, strict=False))
        self._firsts = {ord(cover): first for first, cover in self._covers.items()}
        self._all_covers = {ord(first): cover for first, cover in self._covers.items()}
        self._any_cover = re.compile(f"[{''.join(self._covers.values())}]")

    def render(self, render: Callable[[Cover], str]) -> str:
        """What a template writes, for `encode`; `render` runs it on texts that are so covered."""
        text = render(self.cover)
        sure = render(lambda text: text.translate(self._all_covers))
        return text if self._marks.find_all(text) == self._marks.find_all(sure) else sure

    def cover(self, text: str) -> str:
        """A text as the template may see it, of the same length."""
        return self._marks.pattern.sub(lambda match: self._covers[match[0]], text)

    def uncover(self, covered: str) -> str:
        """The text as it was."""
        return covered.translate(self._firsts)

    def encode(self, covered: str, encode: Encode) -> list[int]:
        """Ids of a text with covers in it, which become what they were, but begin no mark."""
        text = self.uncover(covered)
        places = (match.start() for match in self._any_cover.finditer(covered))
        return _encode_cut(text, [i for i in places if self._marks.begins_at(text, i)], encode)


def make_shield(texts: Collection[str], mark_texts: tuple[str, ...]) -> Shield | None:
    """A shield for the texts of a conversation; None if none of them holds a bit of a mark."""
    marks = read_marks(mark_texts)
    if marks is None or not any(first in text for text in texts for first in marks.firsts):
        return None
    return Shield(marks, texts)


def _encode_cut(text: str, places: Sequence[int], encode: Encode) -> list[int]:
    """Ids of a text that is cut behind the characters at those places."""
    cuts = [0, *(place + 1 for place in places), len(text)]
    ids: list[int] = []
    for begin, end in zip(cuts, cuts[1:], strict=False):
        if begin < end:
            ids += encode(text[begin:end])
    return ids
