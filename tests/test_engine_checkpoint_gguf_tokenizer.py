"""The tokenizer of a GGUF file: the same ids as the `tokenizer.json` that the file was made of."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers

from engine.checkpoint_gguf_header import GgufHeader
from engine.checkpoint_gguf_tokenizer import PATTERNS, begin_token_ids, tokenizer_texts
from engine.errors import CheckpointError
from engine.tokenizer_json import make_json_tokenizer
from tests.gguf_files import byte_level_metadata, sentencepiece_metadata
from tests.json_tokenizers import train_byte_fallback, train_byte_level

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SAMPLES = [
    "It's 2024; don't  WE'LL say\n\n\tpi is 3.14159!\r\n  ",
    "北京大学的学生在 2024 年写了一本书。",
    "<|im_start|>user\nnaïve 😀👍🏽<|im_end|>\n",
    "for i in range(10):\n    print(f'{x[i]}')",
]


def opened(tmp_path, metadata):
    header = GgufHeader(tmp_path / "it.gguf", metadata, {})
    return make_json_tokenizer("it", tokenizer_texts(header).tokenizer)


@pytest.fixture(scope="module")
def byte_level():
    return train_byte_level()


@pytest.fixture(scope="module")
def byte_fallback():
    return train_byte_fallback()


@pytest.fixture(scope="module")
def rebuilt(byte_level, byte_fallback, tmp_path_factory):
    path = tmp_path_factory.mktemp("rebuilt")
    return (
        opened(path, byte_level_metadata(byte_level, "smollm")),
        opened(path, sentencepiece_metadata(byte_fallback)),
    )


@given(TEXTS | st.sampled_from(SAMPLES))
def test_ids_are_those_of_the_original(rebuilt, byte_level, byte_fallback, text):
    for tokenizer, original in zip(rebuilt, (byte_level, byte_fallback), strict=True):
        ids = original.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text) == ids
        assert tokenizer.vocab_size == original.get_vocab_size()
        assert tokenizer.decode(ids) == original.decode(ids)


@pytest.mark.parametrize("text", SAMPLES)
def test_gpt2_is_the_pattern_of_the_library(tmp_path, byte_level, text):
    original = Tokenizer.from_str(byte_level.to_str())
    original.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = opened(tmp_path, byte_level_metadata(original, "gpt-2"))
    assert tokenizer.encode(text) == original.encode(text).ids


@pytest.mark.parametrize("pre", ["llama-bpe", "qwen2"])
@pytest.mark.parametrize("text", SAMPLES)
def test_other_patterns_are_those_of_transformers(tmp_path, byte_level, pre, text):
    mapping = pytest.importorskip("transformers.integrations.gguf.gguf_tokenizer_mapping")
    metadata = byte_level_metadata(byte_level, pre)
    values = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    names = {"tokenizer_type": "model", "pre_tokenizer_type": "pre"}
    values |= {name: values[key] for name, key in names.items()}
    oracle, _ = mapping.convert_gguf_tokenizer("llama", values)
    tokenizer = opened(tmp_path, metadata)
    assert tokenizer.encode(text) == oracle.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("gpt-4o", "HelloWORLD's 12345", ["Hello", "WORLD's", " ", "123", "45"]),
        ("gpt-4o", "a/b\n c...//\nd  e", ["a", "/b", "\n", " c", "...//\n", "d", " ", " e"]),
        ("deepseek-v3", "x1234.foo 中文abc", ["x", "123", "4", ".foo", " ", "中文", "abc"]),
        ("deepseek-v3", "Don't  stop!\n", ["Don", "'t", " ", " stop", "!\n"]),
    ],
)
def test_where_texts_are_split(tmp_path, byte_level, pre, text, pieces):
    header = GgufHeader(tmp_path / "it.gguf", byte_level_metadata(byte_level, pre), {})
    split = Tokenizer.from_str(tokenizer_texts(header).tokenizer).pre_tokenizer
    spans = [place for _, place in split.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == pieces


@pytest.mark.parametrize("pre", PATTERNS)
def test_every_pattern_keeps_texts(tmp_path, byte_level, pre):
    metadata = {**byte_level_metadata(byte_level, pre), "tokenizer.ggml.add_bos_token": False}
    tokenizer = opened(tmp_path, metadata)
    for text in (SAMPLES[0], SAMPLES[1], SAMPLES[3]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_without_a_space_before_a_text(tmp_path, byte_fallback):
    metadata = sentencepiece_metadata(byte_fallback)
    tokenizer = opened(tmp_path, {**metadata, "tokenizer.ggml.add_space_prefix": False})
    assert tokenizer.decode(tokenizer.encode(" a b")) == " a b"
    assert tokenizer.encode("a")[0] == byte_fallback.token_to_id("a")


def test_what_stands_before_a_text(tmp_path, byte_level, byte_fallback):
    def begin(metadata):
        return begin_token_ids(GgufHeader(tmp_path / "it.gguf", metadata, {}))

    pieces = sentencepiece_metadata(byte_fallback)
    assert begin(pieces) == (1,)
    assert begin({**pieces, "tokenizer.ggml.add_bos_token": False}) == ()
    letters = byte_level_metadata(byte_level, "llama-bpe")
    assert begin(letters) == ()
    del letters["tokenizer.ggml.add_bos_token"]
    assert begin(letters) == (1,)
    assert begin({**letters, "tokenizer.ggml.pre": "qwen2"}) == ()
    text = tokenizer_texts(GgufHeader(tmp_path / "it.gguf", pieces, {})).tokenizer
    assert Tokenizer.from_str(text).encode("a").ids[0] == 1


def test_tokens_in_plain_letters_and_of_the_user(tmp_path, byte_level):
    metadata = byte_level_metadata(byte_level, "smollm")
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    metadata |= {
        "tokenizer.ggml.tokens": [*tokens, "<think> it", "  two"],
        "tokenizer.ggml.token_type": [*kinds, 4, 1],
    }
    tokenizer = opened(tmp_path, metadata)
    last = tokenizer.vocab_size - 1
    assert tokenizer.encode("<think> it") == [last - 1]
    assert tokenizer.decode([last - 1, last]) == "<think> it  two"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "bert"}, "tokenizers of kind 'bert' are not supported; supported: gpt2, llama"),
        ({"model": None}, "tokenizer.ggml.model is missing; expected a text"),
        ({"pre": "tekken"}, "split as 'tekken' are not supported; supported: default, gpt-2"),
        ({"tokens": None}, "tokenizer.ggml.tokens is missing; expected texts"),
        ({"tokens": [1, 2]}, "tokenizer.ggml.tokens is "),
        ({"tokens": ["a", "a"]}, "a token is there twice"),
        ({"tokens": ["a", "b" * 1001]}, "a token has 1001 characters, more than any"),
        ({"token_type": [1]}, "token_type fits not its tokens"),
        ({"merges": None}, "tokenizer.ggml.merges is missing"),
        ({"eos_token_id": 10**6}, "eos_token_id is 1000000; there are 400 tokens"),
        ({"add_bos_token": True, "bos_token_id": -1}, "bos_token_id is -1"),
        ({"model": "llama"}, "tokenizer.ggml.scores fits not its tokens"),
    ],
)
def test_what_is_wrong_is_told(tmp_path, byte_level, changes, reason):
    metadata = byte_level_metadata(byte_level, "smollm")
    for key, value in changes.items():
        metadata[f"tokenizer.ggml.{key}"] = value
    with pytest.raises(CheckpointError, match=rf"it\.gguf: .*{reason}"):
        tokenizer_texts(GgufHeader(tmp_path / "it.gguf", metadata, {}))
