import io

import pytest
import sentencepiece
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.generation.logits_process import NoBadWordsLogitsProcessor

from engine.bad_words import BadWords, bad_word_ids
from engine.errors import EngineError, RequestError
from engine.generation import Generation, generate, require_choice
from engine.prompt import build_request
from engine.request import SamplingParams
from engine.tokenizer import ByteTokenizer
from engine.tokenizer_cpm2 import Cpm2Tokenizer
from engine.tokenizer_sentencepiece import SentencePieceTokenizer
from tests.tiny import MOE, byte_tokenizer, tiny_model

TOKENIZER = byte_tokenizer()
TOKENS = ["<unk>", "<s>", "<pad>", "<eod>", "\u2582", "\u2583", "<s_0>", "<s_1>"]
TOKENS += ["a", "1", "(", "x", "love", "lo", "ve", "中", "北京", "北", "京"]


def request(prompt="abc", decoder_prompt=None, **params):
    params = SamplingParams(**params)
    return build_request(prompt, TOKENIZER, MOE, params, "r", decoder_prompt=decoder_prompt)


@given(
    history=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    words=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=5),
)
def test_bans_equal_those_of_transformers(history, words):
    processor = NoBadWordsLogitsProcessor(words, eos_token_id=torch.tensor([99]))
    scores = torch.linspace(-1, 1, 8).unsqueeze(0)
    expected = processor(torch.tensor([history]), scores.clone())[0]
    bad = BadWords(words)
    got = scores[0].clone()
    got[[*bad.single_ids, *bad.ending_after(history)]] = -torch.inf
    assert torch.equal(got, expected)


def test_a_bad_word_is_never_completed():
    model = tiny_model(seed=9)

    def tokens(**params):
        asked = request(max_tokens=20, ignore_eos=True, **params)
        *pieces, _ = generate(model, TOKENIZER, asked)
        return [token for piece in pieces for token in piece.token_ids]

    free = tokens()
    assert free[0] not in tokens(bad_words=((free[0],),))
    pair = (free[3], free[4])
    banned = tokens(bad_words=(pair,))
    assert pair not in set(zip(banned, banned[1:], strict=False))
    assert free[3] in banned


def test_what_the_decoder_was_given_may_have_begun_one():
    a, b = TOKENIZER.encode("ab")
    row = Generation(request(decoder_prompt="a", bad_words=((a, b),)), TOKENIZER, MOE)
    assert row.ban(torch.zeros(MOE.vocab_size))[b].isneginf()
    row.push(b + 1)
    assert row.ban(torch.zeros(MOE.vocab_size))[b] == 0


def test_bad_words_that_leave_nothing_are_refused_or_fail_the_request():
    a, b = TOKENIZER.encode("ab")
    nothing = request(allowed_token_ids=(a,), bad_words=((a,),))
    with pytest.raises(RequestError, match="allowed_token_ids leaves no token"):
        require_choice(nothing, TOKENIZER, MOE)
    everything = request(bad_words=tuple((i,) for i in range(384)))
    with pytest.raises(RequestError, match="bad_words leaves no token") as caught:
        require_choice(everything, TOKENIZER, MOE)
    assert caught.value.field == "bad_words"
    later = request(allowed_token_ids=(a,), bad_words=((a, a),))
    require_choice(later, TOKENIZER, MOE)
    with pytest.raises(EngineError, match="no token may come next"):
        list(generate(tiny_model(seed=9), TOKENIZER, later))
    require_choice(request(allowed_token_ids=(a, b), bad_words=((a,),)), TOKENIZER, MOE)


def test_ids_that_the_model_lacks_are_refused():
    with pytest.raises(RequestError, match="token id 384 is outside the vocabulary") as caught:
        request(bad_words=((3, 384),))
    assert caught.value.field == "bad_words"


@pytest.fixture(scope="module")
def pieces():
    model = io.BytesIO()
    lines = ["we love to love a glove", "a lovely (love) 1love", "北京 love 北京"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 9),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return SentencePieceTokenizer(processor)


def never_writes(tokenizer, words, texts):
    """Whether each of those texts, as the tokenizer writes it, would complete a bad word."""
    bad = BadWords(bad_word_ids(words, tokenizer))
    for text in texts:
        ids = tokenizer.encode(text)
        yield any(
            token in bad.single_ids or token in bad.ending_after(ids[:place])
            for place, token in enumerate(ids)
        )


TEXTS = ["love", "we love", "we love to", "(love", "1love"]


def test_words_are_found_at_the_start_after_a_space_and_inside(pieces):
    chinese = Cpm2Tokenizer(TOKENS, lambda text: [text], bilingual=False)
    for tokenizer in (pieces, ByteTokenizer(), chinese):
        assert all(never_writes(tokenizer, ["love", " x "], TEXTS[:1] + TEXTS[3:]))
    assert all(never_writes(pieces, ["love"], TEXTS))
    assert not any(never_writes(pieces, ["lovely"], TEXTS))
    for word in ("北京", "love"):
        found = bad_word_ids([word], pieces)
        assert {pieces.decode(ids).strip() for ids in found} == {word}
        assert len(found) > 1  # with the space and without it


def test_chinese_words_and_pieces_of_the_bilingual_vocabulary():
    bilingual = Cpm2Tokenizer(
        [*TOKENS, "##love", "##lo", "##ve"], lambda text: [text], bilingual=True
    )
    found = bad_word_ids(["love", "北京"], bilingual)
    names = {tuple(([*TOKENS, "##love", "##lo", "##ve"])[i] for i in ids) for ids in found}
    assert names == {("love",), ("##love",), ("北京",)}


def test_a_row_that_ends_in_another_is_left_out():
    chinese = Cpm2Tokenizer(TOKENS, list, bilingual=False)
    assert bad_word_ids(["北"], chinese) == ((TOKENS.index("北"),),)
    assert bad_word_ids([], chinese) == ()


def test_a_word_that_cannot_be_written_need_not_be_banned():
    chinese = Cpm2Tokenizer(TOKENS, list, bilingual=False)
    assert bad_word_ids(["上海"], chinese) == ()


@pytest.mark.parametrize(
    ("word", "message"),
    [(" ", "an empty word"), ("\ud800", "tokenized"), ("a" * 65, "65 tokens; the limit is 64")],
)
def test_words_that_are_none_are_refused(word, message):
    with pytest.raises(RequestError, match=message) as caught:
        bad_word_ids([word], TOKENIZER)
    assert caught.value.field == "bad_words"
