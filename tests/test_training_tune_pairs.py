"""Pairs of sentences out of plain text."""

import json

import pytest
from typer.testing import CliRunner

from server.__main__ import build_app
from training.tune_pairs import make_pairs, split_sentences

TEXTS = [[f"第{name}篇的第{i}句话。" for i in range(5)] for name in "甲乙丙"]


def write(path, texts=TEXTS):
    path.write_text("".join("".join(text) + "\n" for text in texts), encoding="utf-8")
    return path


def test_sentences_of_a_length_that_is_of_use():
    assert split_sentences("第一句话。短。<n>第二句话！第三句没有完") == [
        "第一句话。",
        "第二句话！",
        "第三句没有完",
    ]


def test_each_pair_is_what_its_label_says(tmp_path):
    out = tmp_path / "pairs.jsonl"
    assert make_pairs([write(tmp_path / "a.txt")], out, 300, 1) == 300
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [row["label"] for row in rows[:6]] == ["next", "same", "other"] * 2
    where = {sentence: (t, i) for t, text in enumerate(TEXTS) for i, sentence in enumerate(text)}
    for row in rows:
        (text, first), (other, second) = where[row["first"]], where[row["second"]]
        found = "other" if text != other else "next" if second == first + 1 else "same"
        assert found == row["label"]
        assert found == "other" or second > first
    again = tmp_path / "again.jsonl"
    make_pairs([tmp_path / "a.txt"], again, 300, 1)
    assert again.read_bytes() == out.read_bytes()
    make_pairs([tmp_path / "a.txt"], again, 300, 2)
    assert again.read_bytes() != out.read_bytes()


def test_text_that_gives_no_pairs_is_refused(tmp_path):
    with pytest.raises(ValueError, match="1 lines have more than 2 sentences"):
        make_pairs([write(tmp_path / "a.txt", TEXTS[:1])], tmp_path / "b", 3, 0)
    (tmp_path / "c.txt").write_bytes("天".encode("gb18030"))
    with pytest.raises(ValueError, match=r"c\.txt: is not UTF-8"):
        make_pairs([tmp_path / "c.txt"], tmp_path / "b", 3, 0)


def test_the_command(tmp_path):
    words = ["tune-pairs", str(write(tmp_path / "a.txt")), "--out", str(tmp_path / "p.jsonl")]
    done = CliRunner().invoke(build_app("tune-pairs"), [*words, "--count", "6"])
    assert done.exit_code == 0, done.output
    assert len((tmp_path / "p.jsonl").read_text(encoding="utf-8").splitlines()) == 6
