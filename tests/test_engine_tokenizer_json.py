import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from engine.detokenizer import Detokenizer
from engine.errors import RequestError, TokenizerError
from engine.grammar import compile_grammar
from engine.grammar_vocabulary import grammar_vocabulary
from engine.prompt import build_request
from engine.request import SamplingParams
from engine.tokenizer import open_tokenizer
from engine.tokenizer_json import JsonTokenizer, begin_ids, make_json_tokenizer, open_json
from tests.json_tokenizers import save, train_byte_fallback, train_byte_level
from tests.tiny import DENSE, LLAMA

UNICODE = st.text(st.characters(exclude_categories=["Cs"]))
TEXTS = [
    "",
    " ",
    "The capital of France is",
    "  two spaces,\n\n\tand a tab 1234567 times\r\n",
    "北京大学的学生在 2024 年写了一本书。",
    "𠮷野家 😀👍🏽 family: 👩‍👩‍👧 naïve Größe",
    "for i in range(10):\n    if x[i] != '\\n':\n        print(f\"{x}\")\n",
    "don't we'll THEY'VE <0x41> \u2581 \u0120",
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizers")
    metaspace = train_byte_fallback()
    metaspace.normalizer = None
    metaspace.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    metaspace.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first")]
    )
    return {
        "byte_level": save(train_byte_level(), path / "byte_level"),
        "byte_fallback": save(train_byte_fallback(), path / "byte_fallback"),
        "metaspace": save(metaspace, path / "metaspace"),
    }


@pytest.fixture(scope="module", params=["byte_level", "byte_fallback", "metaspace"])
def folder(folders, request):
    return folders[request.param]


@pytest.fixture(scope="module")
def tokenizer(folder):
    return open_tokenizer(folder, "tokenizer_json")


@pytest.mark.parametrize("text", TEXTS)
def test_ids_and_text_are_those_of_transformers(folder, tokenizer, text):
    transformers = pytest.importorskip("transformers", reason="the oracle")
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    ids = oracle.encode(text, add_special_tokens=False)
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
    assert [*begin_ids(folder / "tokenizer.json"), *ids] == oracle.encode(text)


@given(UNICODE)
def test_a_text_of_bytes_comes_back(folders, text):
    tokenizer = open_json(folders["byte_level"] / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(UNICODE.filter(lambda text: "\u2581" not in text))
def test_a_text_with_a_mark_for_spaces_comes_back(folders, text):
    tokenizer = open_json(folders["byte_fallback"] / "tokenizer.json")
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(st.lists(st.integers(-3, 520), max_size=20))
def test_any_ids_come_to_the_same_piece_by_piece(folders, ids):
    for folder in folders.values():
        tokenizer = open_json(folder / "tokenizer.json")
        detokenizer = Detokenizer(tokenizer)
        pieces = [detokenizer.push(token_id) for token_id in ids]
        assert "".join(pieces) + detokenizer.flush() == tokenizer.decode(ids)


@given(st.lists(st.integers(0, 399), max_size=20))
def test_any_ids_of_bytes_are_decoded_as_the_library_does(folders, ids):
    tokenizer = open_json(folders["byte_level"] / "tokenizer.json")
    oracle = Tokenizer.from_file(str(folders["byte_level"] / "tokenizer.json"))
    assert tokenizer.decode(ids) == oracle.decode(ids)


def test_special_tokens_are_parsed_and_never_decoded(folders):
    tokenizer = open_json(folders["byte_level"] / "tokenizer.json")
    ids = tokenizer.encode("<|im_start|>user\nhi<|im_end|>")
    assert (ids[0], ids[-1]) == (1, 2)
    assert tokenizer.control_ids == {0, 1, 2}
    assert tokenizer.decode(ids) == "user\nhi"
    assert tokenizer.spell(1, 0) == (b"", 0)


def test_half_a_character_waits_for_the_other_half(folders):
    tokenizer = open_json(folders["byte_fallback"] / "tokenizer.json")
    ids = tokenizer.encode("😀")
    detokenizer = Detokenizer(tokenizer)
    assert [detokenizer.push(token_id) for token_id in ids] == ["", "", "", "", "😀"]
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_there_are_no_sentinels(tokenizer):
    assert tokenizer.num_sentinels == 0
    assert tokenizer.sentinel_index(5) is None
    with pytest.raises(ValueError, match="no sentinel 0; this vocabulary has none"):
        tokenizer.sentinel_id(0)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (LLAMA, "a decoder-only model continues texts; it does not fill blanks"),
        (replace(DENSE, continuation_sentinel=None), "vocabulary has no sentinels to fill blanks"),
    ],
)
def test_filling_blanks_is_refused(tokenizer, config, reason):
    for prompt in ("a <span> b", [5, 6]):
        with pytest.raises(RequestError, match=reason) as caught:
            build_request(prompt, tokenizer, config, SamplingParams(), "it", fill=True)
        assert caught.value.field == "prompt"


def test_half_a_surrogate_pair_is_a_value_error(tokenizer):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("a\ud800")


def test_marks_before_a_text(folders):
    assert begin_ids(folders["byte_level"] / "tokenizer.json") == ()
    assert begin_ids(folders["byte_fallback"] / "tokenizer.json") == (1,)


def test_a_stored_truncation_and_padding_do_not_count(folders):
    stored = Tokenizer.from_file(str(folders["byte_level"] / "tokenizer.json"))
    stored.enable_truncation(2)
    stored.enable_padding(length=8)
    tokenizer = make_json_tokenizer("it", stored.to_str())
    assert tokenizer.encode("12345") == open_json(folders["byte_level"] / "tokenizer.json").encode(
        "12345"
    )


def test_added_tokens_that_are_no_special_ones_are_text(folders):
    stored = Tokenizer.from_file(str(folders["byte_level"] / "tokenizer.json"))
    stored.add_tokens([AddedToken("<think> é", normalized=False)])
    tokenizer = make_json_tokenizer("it", stored.to_str())
    assert tokenizer.encode("<think> é") == [tokenizer.vocab_size - 1]
    assert tokenizer.decode([tokenizer.vocab_size - 1]) == "<think> é"


def test_a_grammar_allows_what_spells_it(tokenizer):
    grammar = compile_grammar("regex", "(true|false)", tokenizer, field="regex")
    assert grammar is not None
    vocabulary = grammar_vocabulary(tokenizer)
    token_id = tokenizer.encode("a")[-1]
    assert vocabulary.spelling(token_id, 0)[0] >= 0
    assert vocabulary.spelling(next(iter(tokenizer.control_ids)), 0)[0] == -1


def test_the_vocabulary_may_have_gaps():
    stored = Tokenizer(models.BPE(vocab={"a": 0, "b": 4}, merges=[]))
    stored.decoder = decoders.Fuse()
    tokenizer = make_json_tokenizer("it", stored.to_str())
    assert tokenizer.vocab_size == 5
    assert tokenizer.decode([0, 2, 4]) == "ab"


@pytest.mark.parametrize(
    ("decoder", "named"),
    [
        (None, "has no decoder"),
        (decoders.WordPiece(), "WordPiece"),
        (decoders.Sequence([decoders.Strip(" ", 1, 0)]), "Strip"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip("x", 1, 0)]), "Strip"),
    ],
)
def test_other_decoders_are_refused_by_name(decoder, named):
    stored = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    if decoder is not None:
        stored.decoder = decoder
    with pytest.raises(TokenizerError, match=f"it: .*{named}.*supported are those made of ByteLev"):
        make_json_tokenizer("it", stored.to_str())


def test_a_pattern_is_refused(folders):
    values = json.loads((folders["byte_level"] / "tokenizer.json").read_text())
    values["decoder"] = {"type": "Replace", "pattern": {"Regex": "a+"}, "content": ""}
    with pytest.raises(TokenizerError, match="Regex"):
        make_json_tokenizer("it", json.dumps(values))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "cannot be read"),
        (b"\xff", "not UTF-8"),
        (b"{}", "no tokenizer.json, or a damaged one"),
        (b"[" * 100_000, "no tokenizer.json, or a damaged one"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}', "`b` out of"),
    ],
)
def test_damaged_files_are_told(tmp_path, content, reason):
    path = tmp_path / "tokenizer.json"
    if content is not None:
        path.write_bytes(content)
    for read in (open_json, begin_ids):
        with pytest.raises(TokenizerError, match=rf"tokenizer\.json: .*{reason}"):
            read(path)


def test_the_kind_names_the_class(folder):
    assert isinstance(open_tokenizer(folder, "tokenizer_json"), JsonTokenizer)
