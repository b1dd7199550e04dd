import io
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

from engine.errors import TokenizerError
from engine.tokenizer import open_tokenizer
from engine.tokenizer_cpm2 import load_segmenter
from engine.tokenizer_sentencepiece import (
    Cpm1Tokenizer,
    SentencePieceTokenizer,
    open_cpm1,
    open_sentencepiece,
)

LINES = [
    "hello world, this is a test of the pieces of a model",
    "the quick brown fox jumps over the lazy dog",
    "one encoder, one decoder and a mixture of experts",
    "北京 今天 天气 不错 ， 我们 去 公园 吧",
]
OWN_SENTINELS = [f"\u2581<extra_id_{i}>" for i in (4, 3, 2, 1, 0)]  # as in mT5's model


def train(**options):
    model = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20),
        model_writer=model,
        **{"vocab_size": 400, "hard_vocab_limit": False, "minloglevel": 2}
        | {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1}
        | options,
    )
    return model.getvalue()


@pytest.fixture(scope="module")
def plain():
    model = train(normalization_rule_name="identity")  # the oracle is built without normalising
    return SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def with_bytes():
    return SentencePieceProcessor(model_proto=train(byte_fallback=True))


@pytest.fixture(scope="module")
def with_own():
    model = train(byte_fallback=True, user_defined_symbols=OWN_SENTINELS)
    return SentencePieceProcessor(model_proto=model)


@pytest.fixture(scope="module")
def oracle(plain):
    """The tokenizer of transformers, another implementation, over the same pieces and scores."""
    transformers = pytest.importorskip("transformers", reason="T5's tokenizer as oracle")
    vocabulary = [(plain.id_to_piece(i), plain.get_score(i)) for i in range(plain.vocab_size())]
    vocabulary += [(f"<extra_id_{i}>", 0.0) for i in reversed(range(100))]
    return transformers.T5Tokenizer(vocab=vocabulary)


def byte_ids(processor, text):
    return [processor.piece_to_id(f"<0x{byte:02X}>") for byte in text.encode()]


# T5: sentinels after the pieces


def test_ids_are_those_of_the_transformers_tokenizer_from_a_directory(plain, oracle, tmp_path):
    oracle.save_pretrained(tmp_path)
    loaded = type(oracle).from_pretrained(tmp_path)
    tokenizer = SentencePieceTokenizer(plain)
    for text in [*LINES, "the  test of   a fox ", "北京, hello", "jumps over 公园 models"]:
        assert tokenizer.encode(text) == loaded.encode(text, add_special_tokens=False)


def test_sentinels_are_those_of_the_transformers_tokenizer(plain, oracle):
    tokenizer = SentencePieceTokenizer(plain)
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.num_sentinels == 100
    for index in (0, 1, 57, 99):
        token_id = oracle.convert_tokens_to_ids(f"<extra_id_{index}>")
        assert tokenizer.sentinel_id(index) == token_id
        assert tokenizer.sentinel_index(token_id) == index
    assert tokenizer.sentinel_id(0) == tokenizer.vocab_size - 1
    assert tokenizer.sentinel_id(-1) == tokenizer.sentinel_id(99) == plain.vocab_size()
    assert tokenizer.sentinel_index(plain.vocab_size() - 1) is None


def test_texts_are_those_of_the_transformers_tokenizer(plain, oracle):
    tokenizer = SentencePieceTokenizer(plain)
    for text in LINES:
        ids = tokenizer.encode(text)
        ids = [*ids[:3], tokenizer.sentinel_id(0), *ids[3:], tokenizer.sentinel_id(1)]
        assert tokenizer.decode(ids) == oracle.decode(ids)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_texts_are_those_of_sentencepiece(plain, with_bytes, with_own, data):
    processor = data.draw(st.sampled_from([plain, with_bytes, with_own]))
    some = st.integers(0, processor.vocab_size() - 1).filter(lambda i: not processor.is_byte(i))
    parts = st.one_of(some.map(lambda i: [i]), st.just([processor.piece_to_id("\u2581")]))
    if processor is not plain:
        parts |= st.characters(exclude_categories=["Cs"]).map(lambda c: byte_ids(processor, c))
    ids = [i for part in data.draw(st.lists(parts)) for i in part]
    assert SentencePieceTokenizer(processor).decode(ids) == processor.decode(ids)


def test_a_typed_sentinel_is_text(plain):
    tokenizer = SentencePieceTokenizer(plain)
    ids = tokenizer.encode("hello <extra_id_0> </s><pad>")
    assert not [i for i in ids if tokenizer.sentinel_index(i) is not None or i in (0, 1)]


def test_marks_and_foreign_ids_decode_to_nothing(plain):
    tokenizer = SentencePieceTokenizer(plain)
    ids = tokenizer.encode("hello")
    assert tokenizer.decode([0, -1, *ids, 1, -(10**6), tokenizer.vocab_size, 10**6]) == "hello"
    assert tokenizer.decode([2]) == " \u2047 "
    assert tokenizer.decode([]) == ""


@pytest.mark.parametrize("index", [100, -101])
def test_a_sentinel_out_of_range_is_a_value_error(plain, index):
    with pytest.raises(ValueError, match="allowed: -100 to 99"):
        SentencePieceTokenizer(plain).sentinel_id(index)


def test_half_a_surrogate_pair_is_a_value_error(plain):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        SentencePieceTokenizer(plain).encode("a\ud800")


# Bytes


def test_unknown_characters_go_through_bytes(with_bytes):
    tokenizer = SentencePieceTokenizer(with_bytes)
    ids = tokenizer.encode("hello 😀é")
    assert tokenizer.decode(ids) == "hello 😀é"
    assert ids[-6:] == byte_ids(with_bytes, "😀é")


def test_incomplete_bytes_become_the_replacement_character(with_bytes):
    tokenizer = SentencePieceTokenizer(with_bytes)
    hello, half = tokenizer.encode("hello"), byte_ids(with_bytes, "😀")[:3]
    assert tokenizer.decode([*hello, *half]) == "hello\ufffd"
    assert tokenizer.decode([*half, *hello]) == "\ufffd hello"
    assert tokenizer.decode([*half, half[0], *hello]) == "\ufffd\ufffd hello"


# mT5: sentinels among the pieces


def test_sentinels_of_the_model_are_used(with_own):
    tokenizer = SentencePieceTokenizer(with_own)
    assert tokenizer.num_sentinels == 5
    assert tokenizer.vocab_size == with_own.vocab_size()
    for index in range(5):
        token_id = with_own.piece_to_id(f"\u2581<extra_id_{index}>")
        assert tokenizer.sentinel_id(index) == token_id
        assert tokenizer.sentinel_index(token_id) == index
    ids = [*tokenizer.encode("the"), tokenizer.sentinel_id(3), *tokenizer.encode("dog")]
    assert tokenizer.decode(ids) == "the <extra_id_3> dog"


@pytest.mark.parametrize(
    "text", ["<extra_id_0>", "the <extra_id_3> dog", "a <extra_id_1><extra_id_2> <extra_id_4>"]
)
def test_typed_sentinels_of_the_model_are_text(with_own, text):
    tokenizer = SentencePieceTokenizer(with_own)
    assert set(with_own.encode(text)) & {tokenizer.sentinel_id(i) for i in range(5)}
    ids = tokenizer.encode(text)
    assert [tokenizer.sentinel_index(i) for i in ids] == [None] * len(ids)
    assert tokenizer.decode(ids) == text


def test_a_gap_in_the_sentinels_is_named(tmp_path):
    path = tmp_path / "spiece.model"
    path.write_bytes(train(user_defined_symbols=OWN_SENTINELS[:2] + OWN_SENTINELS[3:]))
    with pytest.raises(TokenizerError, match="spiece.model: .*4 sentinels but no <extra_id_2>"):
        open_sentencepiece(path)


# Files


@pytest.mark.parametrize("content", [b"", b"no model"])
def test_a_damaged_model_is_a_tokenizer_error(tmp_path, content):
    path = tmp_path / "spiece.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match="spiece.model: not a SentencePiece model"):
        open_tokenizer(tmp_path, "sentencepiece")


def test_a_missing_model_is_a_tokenizer_error(tmp_path):
    with pytest.raises(TokenizerError, match="spiece.model: .*cannot be read"):
        open_sentencepiece(tmp_path / "spiece.model")
    with pytest.raises(TokenizerError, match="chinese_vocab.model: .*cannot be read"):
        open_cpm1(tmp_path / "chinese_vocab.model")


# CPM-1


@pytest.fixture(scope="module")
def cpm1(tmp_path_factory):
    path = tmp_path_factory.mktemp("cpm1") / "chinese_vocab.model"
    marks = ["\u2583", "<sep>", "<pad>", "<mask>", "<eod>", "\u2582"]
    path.write_bytes(train(pad_id=-1, unk_id=0, bos_id=1, eos_id=2, user_defined_symbols=marks))
    return open_cpm1(path)


def test_cpm1_cuts_words_and_marks_white_space(cpm1):
    ids = cpm1.encode("今天天气\nfox 公园")
    assert cpm1.decode(ids) == "今天天气\nfox 公园"
    newline, space = (cpm1.encode(mark)[-1] for mark in "\n ")
    assert newline in ids
    assert space in ids


def test_cpm1_has_marks_where_the_released_model_has_them(cpm1):
    assert cpm1.control_ids == {0, 1, 2, 4, 5, 6, 7}
    assert cpm1.decode([3, 4, 7]) == "\n<sep><eod>"  # as the original writes them
    for mark in ("<unk>", "<s>", "<eod>", "<pad>", "\uff1ceod\uff1e"):
        assert not {1, 2, 4, 5, 6, 7} & set(cpm1.encode(f"fox{mark}dog{mark}"))


def test_cpm1_is_the_published_recipe(cpm1, tmp_path):
    """Each step by itself: jieba's words, marks, blanks between; and back."""
    path = tmp_path / "chinese_vocab.model"
    path.write_bytes(cpm1._processor.serialized_model_proto())
    processor = SentencePieceProcessor(model_file=str(path))
    marks = str.maketrans(" \n", "\u2582\u2583")
    for text in (*LINES, "今天天气\n\n不错 fox", " 公园,  world ", "a\tb"):
        words = [word.translate(marks) for word in load_segmenter()(text)]
        ids = cpm1.encode(text)
        assert ids == processor.encode(" ".join(words))
        decoded = processor.decode(ids).replace(" ", "").translate({0x2582: " ", 0x2583: "\n"})
        assert cpm1.decode(ids) == decoded


def test_cpm1_joins_segments_with_blanks(plain):
    tokenizer = Cpm1Tokenizer(plain, lambda text: [text[:3], text[3:]])
    assert tokenizer.encode("foxdog") == plain.encode("fox dog")
    assert tokenizer.decode(plain.encode("fox dog")) == "foxdog"


def test_cpm1_bytes_marks_and_foreign_ids(with_bytes):
    tokenizer = Cpm1Tokenizer(with_bytes, list)
    smile = byte_ids(with_bytes, "😀")
    assert tokenizer.decode([0, *smile, 1, -1, tokenizer.vocab_size]) == "😀"
    assert tokenizer.decode([2, *smile[:1]]) == "\u2047\ufffd"


def test_cpm1_has_no_sentinels(cpm1):
    assert cpm1.num_sentinels == 0
    assert cpm1.sentinel_index(math.inf) is None
    with pytest.raises(ValueError, match="no sentinel 0; this vocabulary has none"):
        cpm1.sentinel_id(0)
