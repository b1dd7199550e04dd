"""Chunks of a stream that differ in nothing but their new text: written into a form, not modelled.

A chunk through pydantic costs 30 us and more, and there is one for each token.
"""

import secrets
from collections.abc import Callable, Sequence

from pydantic import BaseModel
from pydantic_core import to_json

from server.parts import Part
from server.streams import data_frame

Chunks = Callable[[Part], Sequence[BaseModel]]


class TextFrames:
    """Frames of parts that hold a text, the ids of its tokens, and nothing else.

    `chunks` words a part as the route does; it is asked once for each choice, with marks in the
    places of text and ids that nobody can guess and so write elsewhere.
    """

    def __init__(self, chunks: Chunks) -> None:
        self._chunks = chunks
        self._forms: dict[int, tuple[bytes, bool]] = {}

    def frame(self, index: int, text: str, token_ids: tuple[int, ...]) -> bytes:
        """What a chunk with this part comes to, byte by byte; the part must not be empty."""
        form, has_ids = self._forms.get(index) or self._add_form(index)
        if not has_ids:
            return form % to_json(text)
        return form % (to_json(text), to_json(token_ids))

    def _add_form(self, index: int) -> tuple[bytes, bool]:
        text, token_id = secrets.token_hex(16), -secrets.randbits(62)
        (chunk,) = self._chunks(Part(index=index, text=text, token_ids=(token_id,)))
        ids = b"[%d]" % token_id
        before, after = (
            data_frame(chunk.model_dump_json()).replace(b"%", b"%%").split(to_json(text))
        )
        assert ids not in before
        form = before + b"%b" + after.replace(ids, b"%b"), ids in after
        self._forms[index] = form
        return form
