"""Scores of answers, against plain sums and the libraries' own."""

import math

import pytest

from training.metrics_text import (
    Interval,
    bleu,
    distinct,
    label_table,
    mean_interval,
    ndcg,
    reciprocal_rank,
    rouge_l,
    split_words,
)


def test_an_interval_holds_the_mean_and_narrows_with_rows():
    few, many = mean_interval([0, 1, 1, 1]), mean_interval([0, 1, 1, 1] * 100)
    assert few.value == many.value == 0.75
    assert few.low < 0.75 < few.high
    # 1.96 standard errors of 400 draws
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert many.high - many.low == pytest.approx(2 * half, rel=0.1)
    assert mean_interval([0, 1, 1, 1]) == few
    assert str(Interval(0.5)) == "0.5000"
    assert str(Interval(0.5, 0.25, 0.75)) == "0.5000 (95 %: 0.2500 to 0.7500)"


def test_bleu_is_that_of_sacrebleu_and_of_characters_for_chinese():
    import sacrebleu

    answers, references = ["今天天气很好", "明天下雨了"], ["今天天气好", "明天会下雨"]
    expected = sacrebleu.corpus_bleu(answers, [references], tokenize="zh").score
    found = bleu(answers, references, "zh")
    assert found.value == pytest.approx(expected)
    assert found.low <= found.high
    assert bleu(references, references, "zh").value == pytest.approx(100)
    assert bleu(references[:1], references[:1], "zh").low is None


def longest(a, b):
    """Length of the longest common subsequence, by its definition."""
    if not a or not b:
        return 0
    if a[0] == b[0]:
        return 1 + longest(a[1:], b[1:])
    return max(longest(a[1:], b), longest(a, b[1:]))


def test_rouge_counts_chinese_characters_as_words():
    pairs = [("今天很好", "今天真好"), ("a cat sat", "the cat"), ("一样", "一样"), ("", "x")]
    answers, references = zip(*pairs, strict=True)
    for (answer, reference), found in zip(pairs, rouge_l(answers, references), strict=True):
        ours, theirs = split_words(answer), split_words(reference)
        common = longest(ours, theirs)
        assert found == pytest.approx(2 * common / (len(ours) + len(theirs)))


def test_words_are_cut_where_scripts_meet():
    assert split_words("Ab1 cd中文ef，g") == ["ab1", "cd", "中", "文", "ef", "，", "g"]


def test_distinct_counts_pairs_of_words():
    assert distinct(["a b a b", "c"]).value == pytest.approx(2 / 3)
    assert distinct([""]).value == 0


def test_rankings_are_scored_by_place():
    assert reciprocal_rank([0.1, 0.9, 0.5], [0, 0, 1]) == 0.5
    assert reciprocal_rank([1, 2], [0, 0]) == 0
    gains, scores = [3, 2, 0], [0.1, 0.5, 0.9]
    found = (2**2 - 1) / math.log2(3) + (2**3 - 1) / math.log2(4)
    best = (2**3 - 1) + (2**2 - 1) / math.log2(3)
    assert ndcg(scores, gains, 10) == pytest.approx(found / best)
    assert ndcg(scores, gains, 1) == 0
    assert ndcg([3, 2, 1], gains, 2) == 1
    assert ndcg([1, 2], [0, 0], 2) == 0


def test_each_label_has_its_precision_and_recall():
    one, other = label_table(["a", "a", "b"], ["a", "b", "b"])
    assert (one.label, one.rows, one.given) == ("a", 1, 2)
    assert (one.precision, one.recall) == (0.5, 1.0)
    assert one.f1 == pytest.approx(2 / 3)
    assert (other.precision, other.recall) == (1.0, 0.5)
