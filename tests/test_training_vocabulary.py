"""The vocabulary: layout, coverage, merging and the errors."""

from collections import Counter

import pytest

from training.vocabulary import (
    ASCII,
    PUNCTUATION,
    SPECIAL_TOKENS,
    build_vocabulary,
    count_segments,
    count_usage,
    learn_merges,
    match_pieces,
    piece_name,
    sample_lines,
    write_vocabulary,
)

TEXT = "清华大学位于北京。<n>The singing king is bringing good things, and we are learning.\n"


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 20, encoding="utf-8")
    return path


@pytest.fixture
def smallest():
    """Size of the vocabulary of TEXT with three merged pieces and two sentinels."""
    characters = {char for char in TEXT if not char.isascii()}
    singles = characters | set(PUNCTUATION) | set(ASCII) | {"##" + char for char in ASCII}
    return len(SPECIAL_TOKENS) + len(singles - set(SPECIAL_TOKENS)) + 3 + 2


def test_layout_is_specials_pieces_sentinels(text_file, smallest):
    tokens = build_vocabulary([text_file], smallest, num_sentinels=2)
    assert len(tokens) == len(set(tokens)) == smallest
    assert tokens[:12] == [
        *("<unk>", "<s>", "</s>", "\u2583", "<sep>", "<pad>", "<mask>", "<go>", "<eod>"),
        *("\u2581", ",", "\u2582"),
    ]
    assert tokens[-2:] == ["<s_0>", "<s_1>"]
    assert set(ASCII) | {"##" + char for char in ASCII} <= set(tokens)
    assert build_vocabulary([text_file], smallest, num_sentinels=2) == tokens


def test_every_ascii_text_encodes_without_unknowns(text_file, smallest):
    known = frozenset(build_vocabulary([text_file], smallest, num_sentinels=2))
    assert "<unk>" not in match_pieces("x-Y_9%z~{}#", known, 20)


def test_size_too_small_for_the_characters(text_file, smallest):
    with pytest.raises(ValueError, match=f"ask for at least {smallest - 3},"):
        build_vocabulary([text_file], smallest - 4, num_sentinels=2)


def test_size_larger_than_the_text_can_fill(text_file):
    with pytest.raises(ValueError, match="but size 4000 needs 3986; give more text"):
        build_vocabulary([text_file], 4000, num_sentinels=2)


def test_sample_is_spread_over_the_files(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in files:
        path.write_text("".join(f"{path.stem}{index}\n" for index in range(10)), encoding="utf-8")
    assert list(sample_lines(files, 20)) == ["a0", "a3", "a6", "a9", "b0", "b3", "b6", "b9"]


def test_segments_leave_out_white_space():
    assert count_segments(["北京 北京<n>ok"]) == Counter({"北京": 2, "ok": 1})


def test_segments_do_not_depend_on_jiebas_global_dictionary():
    import jieba

    jieba.add_word("北京清华")
    try:
        assert "北京清华" not in count_segments(["北京清华"])
    finally:
        jieba.del_word("北京清华")


def test_only_latin_continuations_are_marked():
    names = [piece_name("ing", True), piece_name("ing", False), piece_name("京", False)]
    assert names == ["ing", "##ing", "京"]


def test_merges_follow_frequency_and_mark_continuations():
    segments = Counter({"aab": 5, "xab": 4, "北京": 3, "a#b": 9})
    base = {"a", "x", "##a", "##b", "北", "京", "#", "###"}
    merged = learn_merges(segments, base, 10)
    assert merged == {"##ab": 9, "aab": 5, "xab": 4, "北京": 3}
    assert list(learn_merges(segments, base, 1)) == ["##ab"]


def test_unknown_characters_do_not_merge():
    assert learn_merges(Counter({"aéb": 5}), {"a", "##b"}, 10) == {}


def test_repeated_letters_merge_without_overlap():
    merged = learn_merges(Counter({"aaaa": 2}), {"a", "##a"}, 10)
    assert merged == {"##aa": 4, "##aaa": 2, "aaaa": 2}


def test_usage_counts_longest_matches():
    usage = count_usage(Counter({"singing": 3, "é": 2}), ["s", "sing", "##ing", "##i"])
    assert usage == Counter({"sing": 3, "##ing": 3, "<unk>": 2})


def test_match_skips_unknown_characters_and_long_segments():
    known = frozenset({"a", "##b", "京"})
    assert match_pieces("aébb京", known, 3) == ["a", "<unk>", "##b", "##b", "京"]
    assert match_pieces("a" * 201, known, 3) == ["<unk>"]


def test_file_has_one_token_per_line(tmp_path):
    write_vocabulary(["<unk>", "\u2582"], tmp_path / "vocab.txt")
    assert (tmp_path / "vocab.txt").read_bytes() == "<unk>\n\u2582\n".encode()
