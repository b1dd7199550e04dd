"""How good answers are: scores of rows or of all of them, with intervals of confidence."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 1000
SEED = 20210610


class Interval(NamedTuple):
    """A score, in 0 .. 1 or as its library gives it, and where it lies in 95 of 100 samples."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.value:.4f}"
        return f"{self.value:.4f} (95 %: {self.low:.4f} to {self.high:.4f})"


def mean_interval(scores: Sequence[float]) -> Interval:
    """The mean of the rows' scores, with a bootstrap over rows; the same each time."""
    values = np.asarray(scores, dtype=np.float64)
    generator = np.random.default_rng(SEED)
    means = [values[generator.integers(0, len(values), len(values))].mean() for _ in range(DRAWS)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(float(values.mean()), float(low), float(high))


def bleu(answers: Sequence[str], references: Sequence[str], tokenize: str) -> Interval:
    """Corpus BLEU of sacrebleu, 0 .. 100, with its own bootstrap."""
    from sacrebleu.metrics.bleu import BLEU

    metric = BLEU(tokenize=tokenize)
    many = len(answers) > 1
    draws = DRAWS if many else 1
    found = metric.corpus_score(list(answers), [list(references)], n_bootstrap=draws)
    if not many:
        return Interval(found.score)
    mean, half = found._mean, found._ci  # the only place where sacrebleu tells them
    return Interval(found.score, max(mean - half, 0.0), mean + half)


def rouge_l(answers: Sequence[str], references: Sequence[str]) -> list[float]:
    """ROUGE-L (F1) of each answer; a Chinese character counts as a word."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    return [
        scorer.score(reference, answer)["rougeL"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]


class _Words:
    """What `rouge_score` counts: words of Latin letters, other characters one by one."""

    def tokenize(self, text: str) -> list[str]:
        return split_words(text)


def split_words(text: str) -> list[str]:
    """Words of a text in small letters; each character that is not ASCII is a word."""
    words: list[str] = []
    begins = True
    for character in text.lower():
        if character.isspace():
            begins = True
            continue
        is_part = character.isascii() and character.isalnum()
        if is_part and not begins:
            words[-1] += character
        else:
            words.append(character)
        begins = not is_part
    return words


def distinct(answers: Sequence[str], size: int = 2) -> Interval:
    """Different n-grams among all of the answers, which has no interval over rows.

    Source: Li et al. (arXiv:1510.03055), distinct-n.
    """
    grams: list[tuple[str, ...]] = []
    for answer in answers:
        words = split_words(answer)
        grams += [tuple(words[i : i + size]) for i in range(len(words) - size + 1)]
    return Interval(len(set(grams)) / max(len(grams), 1))


def reciprocal_rank(scores: Sequence[float], gains: Sequence[float]) -> float:
    """1 / place of the first text that has a gain; 0 if none has."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    return next((1 / place for place, i in enumerate(order, 1) if gains[i] > 0), 0.0)


def ndcg(scores: Sequence[float], gains: Sequence[float], cutoff: int) -> float:
    """Discounted gain of the first texts, of the best there could be; 0 if none has a gain.

    Source: Jarvelin and Kekalainen (2002), with gains 2^g - 1 and discounts log2(place + 1).
    """
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    best = _discounted(sorted(gains, reverse=True)[:cutoff])
    return _discounted([gains[i] for i in order][:cutoff]) / best if best else 0.0


def _discounted(gains: Sequence[float]) -> float:
    return sum((2**gain - 1) / math.log2(place + 1) for place, gain in enumerate(gains, 1))


class LabelScore(NamedTuple):
    """How a label fared: rows that have it, rows that were given it, and the usual shares."""

    label: str
    rows: int
    given: int
    precision: float
    recall: float
    f1: float


def label_table(answers: list[str], right: list[str]) -> list[LabelScore]:
    """A line for each label that a row has or was given."""
    table = []
    for label in sorted({*answers, *right}):
        hits = sum(a == r == label for a, r in zip(answers, right, strict=True))
        rows, given = right.count(label), answers.count(label)
        precision, recall = hits / max(given, 1), hits / max(rows, 1)
        f1 = 2 * hits / max(rows + given, 1)
        table.append(LabelScore(label, rows, given, precision, recall, f1))
    return table
