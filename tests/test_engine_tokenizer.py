import io
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import TokenizerError
from engine.tokenizer import ByteTokenizer, decode_ids, open_tokenizer

ROOT = Path(__file__).parents[1]
VOCABULARY = "<unk>\n<s>\n<pad>\n<eod>\n\u2582\n\u2583\n北京\n<s_0>\n<s_1>\n"


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= token_id < 259 for token_id in ids)
    assert len(ids) == len(text.encode())


def test_bytes_layout():
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("A\n") == [68, 13]
    assert (tokenizer.vocab_size, tokenizer.num_sentinels) == (384, 125)
    assert [tokenizer.sentinel_id(i) for i in (0, 1, 124, -1)] == [259, 260, 383, 383]
    assert [tokenizer.sentinel_index(i) for i in (258, 259, 383, 384)] == [None, 0, 124, None]


def test_bytes_layout_is_that_of_byt5():
    transformers = pytest.importorskip("transformers", reason="ByT5's tokenizer as oracle")
    oracle = transformers.ByT5Tokenizer()
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("Größe 北京") == oracle.encode("Größe 北京", add_special_tokens=False)
    assert tokenizer.vocab_size == len(oracle)
    assert tokenizer.sentinel_id(7) == oracle.convert_tokens_to_ids("<extra_id_7>")


def test_bytes_decode_marks_sentinels_and_half_characters():
    tokenizer = ByteTokenizer()
    half = tokenizer.encode("北")[:2]
    assert tokenizer.decode([259, *half, 68]) == "<extra_id_0>\ufffdA"
    assert tokenizer.decode(half) == "\ufffd"


def test_bytes_spell_nothing_for_marks_and_foreign_ids():
    tokenizer = ByteTokenizer()
    assert tokenizer.decode([0, 1, 2, -1, -5, 384, 10**6]) == ""


def test_bytes_refuse_half_a_surrogate_pair():
    with pytest.raises(ValueError, match="surrogates not allowed"):
        ByteTokenizer().encode("a\ud800")


@pytest.mark.parametrize("index", [125, -126])
def test_a_sentinel_out_of_range_is_a_value_error(index):
    with pytest.raises(ValueError, match=f"no sentinel {index}; allowed: -125 to 124"):
        ByteTokenizer().sentinel_id(index)


def test_decode_ids_hands_the_state_on():
    class Counting(ByteTokenizer):
        def spell(self, token_id, state):
            return f"{token_id}@{state} ".encode(), state + 1

    assert decode_ids(Counting(), [7, 8, 9]) == "7@0 8@1 9@2 "


def test_open_bytes_needs_no_file(tmp_path):
    assert isinstance(open_tokenizer(tmp_path / "absent", "bytes"), ByteTokenizer)


def test_open_cpm2(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(VOCABULARY, encoding="utf-8")
    assert open_tokenizer(tmp_path, "cpm2_zh").encode("北京 北京") == [6, 4, 6]
    path.write_text(VOCABULARY + "##京\n", encoding="utf-8")
    assert open_tokenizer(tmp_path, "cpm2_zh_en").encode("北京") == [6]


def test_open_sentencepiece(tmp_path):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a rose is a rose"] * 9),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (tmp_path / "spiece.model").write_bytes(model.getvalue())
    tokenizer = open_tokenizer(tmp_path, "sentencepiece")
    assert tokenizer.decode(tokenizer.encode("a rose")) == "a rose"


@pytest.mark.parametrize(
    ("kind", "name"),
    [("cpm2_zh", "vocab.txt"), ("cpm2_zh_en", "vocab.txt"), ("sentencepiece", "spiece.model")],
)
def test_open_without_the_file_names_it(tmp_path, kind, name):
    with pytest.raises(TokenizerError, match=rf"{name}: .*cannot be read"):
        open_tokenizer(tmp_path, kind)


def test_importing_the_protocol_is_light():
    heavy = {"jieba", "sentencepiece", "torch", "numpy"}
    code = f"import sys, engine.tokenizer; print({heavy} & {{*sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


def test_control_ids_stand_for_no_text():
    tokenizer = ByteTokenizer()
    assert tokenizer.control_ids == {0, 1, 2}
    assert tokenizer.decode(sorted(tokenizer.control_ids)) == ""


def test_open_cpm1_reads_a_file_of_its_own(tmp_path):
    with pytest.raises(TokenizerError, match=r"chinese_vocab\.model"):
        open_tokenizer(tmp_path, "cpm1")
