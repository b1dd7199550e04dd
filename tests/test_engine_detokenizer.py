import io
import itertools

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.detokenizer import Detokenizer, StopMatcher
from engine.tokenizer import ByteTokenizer
from engine.tokenizer_cpm2 import Cpm2Tokenizer
from engine.tokenizer_sentencepiece import Cpm1Tokenizer, SentencePieceTokenizer

REPLACEMENT = "\ufffd"
MARKS = ["<unk>", "<s>", "<pad>", "<eod>", "\u2582", "\u2583", "<s_0>"]
TOKENS = [*MARKS, "a", "love", "-", "中", "中文", REPLACEMENT, "##ing", "##\u2583"]
KINDS = ["bytes", "cpm2_zh", "cpm2_zh_en", "pieces", "pieces_and_bytes", "cpm1"]


def train(**options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a rose is a rose", "北京 公园"] * 9),
        model_writer=model,
        vocab_size=300,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module")
def tokenizers():
    plain, with_bytes = train(), train(byte_fallback=True)
    return {
        "bytes": ByteTokenizer(),
        "cpm2_zh": Cpm2Tokenizer(TOKENS, list, bilingual=False),
        "cpm2_zh_en": Cpm2Tokenizer(TOKENS, list, bilingual=True),
        "pieces": SentencePieceTokenizer(plain),
        "pieces_and_bytes": SentencePieceTokenizer(with_bytes),
        "cpm1": Cpm1Tokenizer(with_bytes, list),
    }


def draw_ids(data, tokenizer):
    """Any ids, some of them no token at all, and the bytes of characters among them."""
    characters = st.sampled_from("é中😀" + REPLACEMENT).map(tokenizer.encode)
    parts = st.one_of(st.integers(-2, tokenizer.vocab_size + 1).map(lambda i: [i]), characters)
    ids = itertools.chain.from_iterable(data.draw(st.lists(parts, max_size=20)))
    return [i for i in ids if data.draw(st.integers(0, 9))]  # now and then a character loses a byte


# Detokenizer


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None)
def test_joined_pieces_are_the_decoded_text(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    ids = draw_ids(data, tokenizer)
    detokenizer = Detokenizer(tokenizer)
    for _ in range(2):  # the second text starts as the first did
        pieces = [detokenizer.push(token_id) for token_id in ids]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None)
def test_what_was_pushed_is_final(tokenizers, kind, data):
    tokenizer = tokenizers[kind]
    ids, more = draw_ids(data, tokenizer), draw_ids(data, tokenizer)
    detokenizer = Detokenizer(tokenizer)
    shown = "".join(detokenizer.push(token_id) for token_id in ids)
    assert tokenizer.decode(ids + more).startswith(shown)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text("a é中😀\n", max_size=20))
@settings(deadline=None)
def test_half_a_character_is_never_shown(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    detokenizer = Detokenizer(tokenizer)
    assert REPLACEMENT not in "".join(map(detokenizer.push, tokenizer.encode(text)))
    assert detokenizer.flush() == ""


def test_a_character_comes_with_its_last_byte():
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in tokenizer.encode("a中b")] == ["a", "", "", "中", "b"]


def test_half_a_character_comes_out_at_the_end_only():
    detokenizer = Detokenizer(ByteTokenizer())
    first = ByteTokenizer().encode("中")[0]
    assert detokenizer.push(first) == ""
    assert detokenizer.flush() == REPLACEMENT
    assert detokenizer.flush() == ""
    assert detokenizer.push(68) == "A"


def test_spelled_replacement_characters_are_passed_on():
    tokenizer = ByteTokenizer()
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(i) for i in tokenizer.encode(REPLACEMENT)] == ["", "", REPLACEMENT]


def test_each_id_is_looked_at_once():
    class Counting(ByteTokenizer):
        num_spelled = 0

        def spell(self, token_id, state):
            self.num_spelled += 1
            return super().spell(token_id, state)

        def decode(self, ids):
            raise AssertionError("decoding everything again costs more with every id")

    tokenizer = Counting()
    detokenizer = Detokenizer(tokenizer)
    assert "".join(map(detokenizer.push, tokenizer.encode("long " * 100))) == "long " * 100
    assert tokenizer.num_spelled == 500


# StopMatcher


def find_stop(stops, text):
    """The obvious way: look at every beginning of the text whether it ends with a stop string."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end - len(stop)], stop
    return text, None


def longest_open(stops, text):
    """How many characters at the end of the text could still become a stop string."""
    return max(
        (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0
    )


STOPS = st.lists(st.text("ab", min_size=1, max_size=6), max_size=4)
PIECES = st.lists(st.text("ab", max_size=5), max_size=12)


@given(STOPS, PIECES)
@settings(max_examples=500)
def test_stops_are_found_as_in_the_whole_text(stops, pieces):
    matcher = StopMatcher(stops)
    shown = "".join(map(matcher.push, pieces)) + matcher.flush()
    assert (shown, matcher.matched) == find_stop(stops, "".join(pieces))


@given(STOPS, PIECES)
@settings(max_examples=500)
def test_no_more_and_no_less_is_held_back_than_needed(stops, pieces):
    matcher = StopMatcher(stops)
    text = shown = ""
    for piece in pieces:
        text += piece
        shown += matcher.push(piece)
        before, stop = find_stop(stops, text)
        if stop is None:
            assert shown == text[: len(text) - longest_open(stops, text)]
        else:
            assert shown == before


@pytest.mark.parametrize(
    ("stops", "pieces", "shown", "matched"),
    [
        ((), ["a", "b"], ["a", "b", ""], None),
        (("。",), ["好", "的。再", "见"], ["好", "的", "", ""], "。"),
        (("\n\n",), ["a\n", "b\n", "\nc"], ["a", "\nb", "", ""], "\n\n"),
        (("END",), ["xE", "N", "X", "E"], ["x", "", "ENX", "", "E"], None),
        (("aab",), ["aaa", "b"], ["a", "", ""], "aab"),
        (("cd", "bcde"), ["abcde"], ["ab", ""], "cd"),
        (("cd", "bcd"), ["abcd"], ["a", ""], "bcd"),
        (("b", "b"), ["ab"], ["a", ""], "b"),
    ],
)
def test_examples_of_stops(stops, pieces, shown, matched):
    matcher = StopMatcher(stops)
    assert [*map(matcher.push, pieces), matcher.flush()] == shown
    assert matcher.matched == matched


def test_a_flushed_matcher_begins_a_new_text():
    matcher = StopMatcher(["ab"])
    assert [matcher.push("a"), matcher.flush(), matcher.push("b")] == ["", "a", "b"]
    assert matcher.matched is None


def test_an_empty_stop_is_refused():
    with pytest.raises(ValueError, match="a stop string is empty"):
        StopMatcher(["a", ""])


def test_a_long_stop_costs_no_more_per_character():
    matcher = StopMatcher(["a" * 100_000 + "b"])
    assert matcher.push("a" * 150_000) == "a" * 50_000
    assert matcher.push("b") == ""
    assert matcher.matched == "a" * 100_000 + "b"
