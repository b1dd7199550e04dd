import functools
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import TokenizerError
from engine.tokenizer_cpm2 import Cpm2Tokenizer, load_segmenter, open_cpm2, read_vocabulary

ROOT = Path(__file__).parents[1]
RELEASED = ROOT.parent / "shared" / "vocab"
SPECIAL = ["<unk>", "<s>", "</s>", "\u2583", "<sep>", "<pad>", "<mask>", "<eod>", "\u2582"]
CHINESE = [*SPECIAL, *"，：<>_#0s中文世界a", "世界", "ab", "<s_0>", "<s_1>", "<s_2>"]
PIECES = ["##ve", "##d", "##ing", "##\u2583", "##-", "###"]
BILINGUAL = [*SPECIAL, "<go>", *"，#-abIx中文", "中文", "love", "lo", *PIECES, "<s_0>", "<s_1>"]

# text, ids in the Chinese and the bilingual vocabulary, decoded by each (None: the text itself)
GOLDEN = [
    ("清华大学位于北京。", [5971, 840, 474, 12], [5972, 841, 475, 13], None, None),
    ("你好，世界！", [5503, 16, 261, 13], [5504, 17, 262, 14], None, None),
    (
        "今天天气不错\n我们去公园吧",
        [739, 3775, 696, 3, 103, 93, 2627, 134],
        [740, 3776, 697, 3, 104, 94, 2628, 135],
        None,
        None,
    ),
    (
        "I love Beijing.",
        [827, 10, 6764, 10, 6961, 1812, 24810, 42],
        [828, 6765, 31144, 43],
        None,
        "I love Beijing .",
    ),
    (
        "GPT-3 有1750亿个参数",
        [9851, 661, 54, 95, 10, 26, 8108, 348, 1165, 40, 1488],
        [9852, 27059, 55, 96, 11, 27, 43500, 1166, 41, 1489],
        None,
        "GPT - 3 有1750亿个参数",
    ),
    (
        "ＡＢＣ１２３，全角\u3000空格",
        [13942, 9478, 16, 278, 783, 10, 12979],
        [0, 0, 0, 0, 0, 0, 17, 279, 784, 0, 12980],
        "ABC123，全角 空格",
        "<unk> <unk> <unk> <unk> <unk> <unk> ，全角<unk>空格",
    ),
    ("hello world", [21553, 10, 12950], [21554, 12951], None, None),
    (
        "Hello, world! 你好 世界",
        [21992, 9, 10, 12950, 51, 10, 5503, 10, 261],
        [21993, 10, 12951, 52, 11, 5504, 11, 262],
        None,
        "Hello , world ! 你好 世界",
    ),
    ("a  b", [1007, 10, 10, 1466], [1008, 11, 11, 1467], None, None),
    (
        "x=(1+2)*3/4",
        [852, 98, 30, 59, 453, 78, 29, 495, 95, 71, 129],
        [853, 99, 31, 60, 454, 79, 30, 496, 96, 72, 130],
        None,
        "x = ( 1 + 2 ) * 3 / 4",
    ),
    ("问题：", [96, 17], [97, 18], None, None),
    ("选项：", [6295, 17], [6296, 18], None, None),
    ("文章：", [1395, 17], [1396, 18], None, None),
    ("查询：", [3434, 17], [3435, 18], None, None),
    ("标题：", [5122, 17], [5123, 18], None, None),
    ("历史：", [425, 17], [426, 18], None, None),
    ("图谱：", [498, 2294, 17], [499, 2295, 18], None, None),
    ("矛盾", [2590], [2591], None, None),
    ("相似", [2946], [2947], None, None),
    ("", [], [], None, None),
]


@pytest.fixture(scope="module")
def chinese():
    return Cpm2Tokenizer(CHINESE, load_segmenter(), bilingual=False)


@pytest.fixture(scope="module")
def bilingual():
    return Cpm2Tokenizer(BILINGUAL, load_segmenter(), bilingual=True)


@functools.cache
def open_released(name, **options):
    path = RELEASED / name / "vocab.txt"
    if not path.exists():
        pytest.skip(f"the released vocabulary {name} is not there")
    return open_cpm2(path, bilingual=name == "bpe_cn_en", **options)


def write(folder, tokens):
    path = folder / "vocab.txt"
    path.write_bytes(b"".join(token.encode() + b"\n" for token in tokens))
    return path


# The released vocabularies


@pytest.mark.parametrize(("text", "zh_ids", "zh_en_ids", "zh_back", "zh_en_back"), GOLDEN)
def test_golden_vectors(text, zh_ids, zh_en_ids, zh_back, zh_en_back):
    for name, ids, back in (("bpe_cn", zh_ids, zh_back), ("bpe_cn_en", zh_en_ids, zh_en_back)):
        tokenizer = open_released(name)
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode(ids) == (text if back is None else back)


@pytest.mark.parametrize(("text", "ids"), [("矛盾", [2591, 2591]), ("相似", [2947, 2947])])
def test_golden_vectors_of_the_duplicating_original(text, ids):
    tokenizer = open_released("bpe_cn_en", legacy_duplicate=True)
    assert tokenizer.encode(text) == ids
    assert tokenizer.encode("你好，世界！") == [5504, 17, 262, 14]
    assert tokenizer.encode("") == []
    assert open_released("bpe_cn", legacy_duplicate=True).encode("矛盾") == [2590]


@pytest.mark.parametrize(
    ("name", "size", "num_sentinels", "first"),
    [("bpe_cn", 26240, 190, 26050), ("bpe_cn_en", 51968, 185, 51783)],
)
def test_layout_of_the_released_files(name, size, num_sentinels, first):
    tokenizer = open_released(name)
    assert (tokenizer.vocab_size, tokenizer.num_sentinels) == (size, num_sentinels)
    assert tokenizer.sentinel_id(0) == first
    assert tokenizer.sentinel_id(-1) == tokenizer.sentinel_id(num_sentinels - 1) == size - 1
    assert tokenizer.sentinel_index(first + 7) == 7
    assert tokenizer.sentinel_index(first - 1) is None


@pytest.mark.parametrize("name", ["bpe_cn", "bpe_cn_en"])
def test_typed_special_tokens_are_text(name):
    tokenizer = open_released(name)
    ids = tokenizer.encode("<s_0>一<eod></s><unk>")
    assert tokenizer.decode(ids).replace(" ", "") == "<s_0>一<eod></s><unk>"
    assert min(ids) > 8
    assert all(tokenizer.sentinel_index(token_id) is None for token_id in ids)


# The rules, with vocabularies of our own


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("世界 a\n中文", ["世界", "\u2582", "a", "\u2583", "中", "文"]),
        ("Ａ：\u3000ａ", ["<unk>", "：", "\u2582", "a"]),  # narrowed, but for nine marks
        ("abba", ["ab", "<unk>", "a"]),  # the longest first, then one character further
        ("\ta\r\n", ["<unk>", "a", "<unk>", "\u2583"]),
        ("<s_0>", ["<", "s", "_", "0", ">"]),
        ("\ud800a", ["<unk>", "a"]),
        ("", []),
    ],
)
def test_chinese_encoding(chinese, text, tokens):
    assert [CHINESE[i] for i in chinese.encode(text)] == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("I love 中文 x", ["I", "love", "\u2582", "中文", "\u2582", "x"]),
        ("loved loing", ["love", "##d", "lo", "##ing"]),
        ("a , b", ["a", "<unk>", "b"]),  # the unknown counts as English
        ("a  b", ["a", "\u2582", "\u2582", "b"]),
        (" a ", ["\u2582", "a", "\u2582"]),  # neither the first nor the last is left out
        ("中a", ["中", "a"]),
        ("\n", ["\u2583"]),
        ("x\r\na", ["x", "<unk>", "##\u2583", "a"]),
        ("##", ["#", "###"]),  # not the piece of that name
        ("ａ", ["<unk>"]),
    ],
)
def test_bilingual_encoding(bilingual, text, tokens):
    assert [BILINGUAL[i] for i in bilingual.encode(text)] == tokens


def test_a_piece_is_not_matched_at_the_start_of_a_segment():
    tokenizer = Cpm2Tokenizer(BILINGUAL, lambda text: [text], bilingual=True)
    assert [BILINGUAL[i] for i in tokenizer.encode("##ing")] == ["#", "###", "##ing"]


def test_control_tokens_are_out_of_reach_whatever_the_segmenter():
    tokenizer = Cpm2Tokenizer(CHINESE, lambda text: [text], bilingual=False)
    assert [CHINESE[i] for i in tokenizer.encode("<s_0><s>")] == [*"<s_0>", "<", "s", ">"]


def test_a_segment_over_200_characters_is_one_unknown(chinese):
    assert chinese.encode("a" * 200) == [CHINESE.index("a")] * 200
    assert chinese.encode("a" * 201) == [0]


def test_the_only_token_comes_twice_in_legacy_mode(bilingual):
    legacy = Cpm2Tokenizer(BILINGUAL, load_segmenter(), bilingual=True, legacy_duplicate=True)
    assert legacy.encode("中文") == bilingual.encode("中文") * 2
    assert legacy.encode("中文 a") == bilingual.encode("中文 a")
    assert legacy.encode("") == []


def test_the_space_is_looked_up():
    moved = [token for token in BILINGUAL if token != "\u2582"] + ["\u2582"]
    tokenizer = Cpm2Tokenizer(moved, load_segmenter(), bilingual=True)
    tokens = [moved[i] for i in tokenizer.encode("a 中 a b")]
    assert tokens == ["a", "\u2582", "中", "\u2582", "a", "b"]


@given(st.text("，：<>_#0s中文世界ab \n"))
def test_chinese_decoding_reverses_encoding(text):
    tokens = [*CHINESE, "b"]
    tokenizer = Cpm2Tokenizer(tokens, load_segmenter(), bilingual=False)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["I", "love", "-", "中", "-", "文"], "I love -中-文"),
        (["lo", "##ve", "##d", "lo"], "loved lo"),
        (["a", "\u2583", "b"], "a \n b"),
        (["中", "##ing", "a"], "中inga"),
        (["<s>", "<s_0>", "a"], "<s> <s_0> a"),
        (["##ing", "a"], "##ing a"),
        (["a", "\u2582", "##ing", "b"], "a  ing b"),
        (["a", "\u2582", "\u2582", "##ing"], "a  ing"),
        ([], ""),
    ],
)
def test_bilingual_decoding(bilingual, tokens, text):
    assert bilingual.decode([BILINGUAL.index(token) for token in tokens]) == text


def join_words(tokens):
    """Decode as the paper's code describes it: first glue the pieces, then put the spaces."""
    words = []
    for token in tokens:
        if words and token.startswith("##"):
            words[-1] += token[2:]
        else:
            words.append(token)
    is_foreign = [not (word == "\u2582" or set(word) & set("中文")) for word in words]
    text = "".join(
        "\u2582" * (i > 0 and is_foreign[i - 1] and is_foreign[i]) + word
        for i, word in enumerate(words)
    )
    return text.replace("\u2582", " ").replace("\u2583", "\n")


@given(st.lists(st.sampled_from(BILINGUAL)))
@settings(max_examples=300)
def test_bilingual_decoding_equals_its_definition(tokens):
    tokenizer = Cpm2Tokenizer(BILINGUAL, list, bilingual=True)
    assert tokenizer.decode([BILINGUAL.index(token) for token in tokens]) == join_words(tokens)


def test_foreign_ids_add_nothing(chinese, bilingual):
    for tokenizer, tokens in ((chinese, CHINESE), (bilingual, BILINGUAL)):
        a = tokens.index("a")
        assert tokenizer.decode([-1, a, -len(tokens), len(tokens), 10**6]) == "a"


def test_sentinels(chinese):
    assert chinese.num_sentinels == 3
    assert chinese.sentinel_id(-1) == chinese.sentinel_id(2) == len(CHINESE) - 1
    assert chinese.sentinel_index(chinese.sentinel_id(1)) == 1
    assert chinese.sentinel_index(0) is None
    with pytest.raises(ValueError, match="no sentinel 3; allowed: -3 to 2"):
        chinese.sentinel_id(3)


# The file


@pytest.mark.parametrize("end", [b"", b"\n", b"\r\n"])
def test_the_last_line_may_end_either_way(tmp_path, end):
    path = tmp_path / "vocab.txt"
    path.write_bytes("a\nb\u2028c\nd".encode() + end)
    assert read_vocabulary(path) == ["a", "b\u2028c", "d"]


def test_windows_line_ends_are_no_part_of_a_token(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join(CHINESE).encode())
    assert open_cpm2(path, bilingual=False).encode("世界") == [CHINESE.index("世界")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a\nb\na\n", "vocab.txt:3: 'a' is on line 1 already"),
        (b"a\n\nb\n", "vocab.txt:2: blank line"),
        (b"a\nb\n \n", "vocab.txt:3: blank line"),
        (b"a\n\xff\xfe\n", "vocab.txt:2: .* is not UTF-8"),
    ],
)
def test_a_damaged_line_is_named(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        read_vocabulary(path)


def test_an_unreadable_file_is_a_tokenizer_error(tmp_path):
    with pytest.raises(TokenizerError, match="cannot be read"):
        read_vocabulary(tmp_path)


@pytest.mark.parametrize("missing", ["<unk>", "<s>", "<pad>", "<eod>", "\u2582", "\u2583"])
def test_a_missing_special_token_is_named(tmp_path, missing):
    path = write(tmp_path, [token for token in CHINESE if token != missing])
    with pytest.raises(TokenizerError, match=f"vocab.txt: no {missing}; this is no vocabulary"):
        open_cpm2(path, bilingual=False)


def test_an_empty_file_has_no_special_tokens(tmp_path):
    with pytest.raises(TokenizerError, match="no <unk>, <s>, <pad>"):
        open_cpm2(write(tmp_path, []), bilingual=False)


def test_a_vocabulary_without_sentinels_is_refused(tmp_path):
    path = write(tmp_path, [token for token in CHINESE if not token.startswith("<s_")])
    with pytest.raises(TokenizerError, match="no sentinels"):
        open_cpm2(path, bilingual=False)


def test_a_gap_in_the_sentinels_is_named(tmp_path):
    tokens = [token for token in CHINESE if token != "<s_1>"]
    with pytest.raises(TokenizerError, match=f"vocab.txt:{len(tokens)}: <s_2> without <s_1>"):
        open_cpm2(write(tmp_path, tokens), bilingual=False)


@pytest.mark.parametrize(
    ("tokens", "is_bilingual", "message"),
    [
        (CHINESE, True, 'none of the tokens start with "##"; use kind cpm2_zh$'),
        (BILINGUAL, False, 'some of the tokens start with "##"; use kind cpm2_zh_en$'),
    ],
)
def test_the_vocabulary_of_the_other_mode_is_refused(tmp_path, tokens, is_bilingual, message):
    with pytest.raises(TokenizerError, match=message):
        open_cpm2(write(tmp_path, tokens), bilingual=is_bilingual)


# jieba


def test_threads_share_one_segmenter():
    with ThreadPoolExecutor(4) as pool:
        segmenters = list(pool.map(lambda _: load_segmenter(), range(8)))
        cuts = list(pool.map(lambda cut: list(cut("清华大学位于北京。")), segmenters))
    assert all(cut == ["清华大学", "位于", "北京", "。"] for cut in cuts)
    assert all(segmenter == segmenters[0] for segmenter in segmenters)


def test_words_added_to_jieba_elsewhere_change_nothing(monkeypatch):
    segment = load_segmenter()
    import jieba  # only now, when its warnings are over

    own_words = {"位于北京": 10**9, "位于北": 0, "位于": 0, "位": 0}
    for name, value in (("FREQ", own_words), ("total", 10**9), ("initialized", True)):
        monkeypatch.setattr(jieba.dt, name, value)
    assert "位于北京" in jieba.cut("清华位于北京")
    assert list(segment("清华位于北京")) == ["清华", "位于", "北京"]


def test_jieba_loads_without_warning_log_or_shared_cache(tmp_path):
    # Without compiled files of jieba, so that its compile-time warnings would show.
    code = "from engine.tokenizer_cpm2 import load_segmenter as f; print(*f()('clean'))"
    options = ["-W", "error", "-X", f"pycache_prefix={tmp_path}"]
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.strip(), done.stderr, done.returncode) == ("clean", "", 0)
    assert not list(tmp_path.rglob("*.cache"))
