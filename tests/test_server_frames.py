"""Chunks that are written into a form are those that pydantic would have written."""

import pytest

from engine.request import Request
from server.chat import ChatStyle
from server.completions import CompletionStyle, GenerationStyle
from server.frames import TextFrames
from server.logprobs import TokenNames
from server.parts import Head, Part
from server.streams import data_frame
from server.writing import Draft
from tests.fakes import ByteTokenizer

TEXTS = [
    "a",
    "",
    'quote " backslash \\ slash /',
    "line\nfeed\r\n tab\t nul\x00 esc\x1b del\x7f",
    "\u4f60\u597d \u2028 \u2029 \U0001f600 \ufffd",
    "100 % %b %s {0} </script>",
]
# What callers name turns up in every chunk, and must not be taken for a place to fill.
MODELS = ["org/tiny", "%b %s %%", "[1]", '"text":""']


def wording_of(style, model, *, has_token_ids, logprobs=None):
    head = Head(id="x-1", model=model, fingerprint="fp_1", adapter="task@1")
    draft = Draft(prompts=["a"], max_tokens=4, logprobs=logprobs)
    names = TokenNames(ByteTokenizer())
    return style(head=head, names=names, draft=draft, has_token_ids=has_token_ids)


@pytest.mark.parametrize("style", [CompletionStyle, GenerationStyle, ChatStyle])
@pytest.mark.parametrize("has_token_ids", [False, True])
@pytest.mark.parametrize("logprobs", [None, 2])
def test_a_filled_form_is_what_a_model_comes_to(style, has_token_ids, logprobs):
    for model in MODELS:
        wording = wording_of(style, model, has_token_ids=has_token_ids, logprobs=logprobs)
        frames = TextFrames(lambda part, wording=wording: wording.chunks(part, None))
        for index in (0, 1, 0):
            for text in TEXTS:
                for token_ids in ((7,), (7, 250_111)):
                    part = Part(index=index, text=text, token_ids=token_ids)
                    (chunk,) = wording.chunks(part, None)
                    whole = data_frame(chunk.model_dump_json())
                    assert frames.frame(index, text, token_ids) == whole


def test_text_without_ids_has_an_empty_list_of_them():
    wording = wording_of(CompletionStyle, "m", has_token_ids=True)
    frames = TextFrames(lambda part: wording.chunks(part, None))
    (chunk,) = wording.chunks(Part(index=0, text="held back"), None)
    assert frames.frame(0, "held back", ()) == data_frame(chunk.model_dump_json())


def test_the_first_part_is_told_by_the_model():
    wording = wording_of(CompletionStyle, "m", has_token_ids=True)
    request = Request(request_id="r", encoder_ids=(1, 2))
    (chunk,) = wording.chunks(Part(index=0, text="a", token_ids=(7,), request=request), None)
    assert chunk.choices[0].prompt_token_ids == [1, 2]
