"""Tasks as data: the ready ones on tiny rows, and every row that cannot be used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.errors import ConfigError
from tests.tiny import DENSE, byte_tokenizer, tiny_model
from training.task_eval import evaluate_task
from training.task_examples import format_list, make_slots, read_examples
from training.task_readers import closing_id, encoder_ids
from training.task_rows import read_rows
from training.tasks import ListFormat, open_task, parse_task, ready_tasks
from training.tune_model import Scorer

TOKENIZER = byte_tokenizer()
LONG = replace(DENSE, max_positions=512)
ROWS = {
    "adgen": {"title": "裙", "tags": ["新", "红"], "feature": [["色", "红"]], "desc": "好裙"},
    "c3": {"text": "天晴", "question": "天?", "choice": ["晴", "雨"], "answer": "晴"},
    "ccpm": {"translation": "月亮", "choices": ["明月", "白日"], "answer": 0},
    "dialogue_zh": {"query": "天晴", "response": "出门"},
    "clause_zh": {"text": "房间不错，", "answer": "早餐丰富"},
    "clause_zh_lm": {"text": "房间不错，", "answer": "早餐丰富"},
    "lcqmc": {"sentence1": "甲", "sentence2": "乙", "label": "1"},
    "lcqmc_pair": {"sentence1": "甲", "sentence2": "乙", "label": 0},
    "lcsts": {"text": "新闻", "summary": "闻"},
    "math23k": {"text": "1加1", "equation": "x=1+1"},
    "sentiment_zh": {"text": "好吃", "label": 1},
    "sentiment_zh_lm": {"text": "好吃", "label": 1},
    "sentiment_zh_slots": {"text": "好吃", "label": 1},
    "next_sentence_zh": {"first": "天晴。", "second": "出门。", "label": "next"},
    "sogou_log": {"query": "天", "pos_doc": "天气", "neg_doc": "车"},
    "sogou_log_ranking": {"query": "天", "docs": ["车", "天气", "云"], "gains": [0, 2, 1]},
    "spam_en": {"text": "Win money now", "label": "spam"},
    "spam_en_lm": {"text": "Win money now", "label": "spam"},
    "subject_en": {"text": "The build fails", "answer": "Kernel patch"},
    "wmt_en_zh": {"source": "hello", "target": "你好"},
    "zero_shot_apps": {"sentence": "球", "label_des": "卡牌"},
    "zero_shot_idioms": {"before": "他", "after": "。", "candidates": ["甲", "乙"], "answer": "乙"},
    "zero_shot_inference": {"sentence1": "甲", "sentence2": "乙", "label": "neutral"},
    "zero_shot_news": {"sentence": "球", "label": 103},
}
TEXTS = {
    "adgen": "裙；新，红；色：红；",
    "c3": "问题：天?选项：一、晴；二、雨；文章：天晴",
    "ccpm": "选项：一、明月；二、白日；文章：月亮",
    "lcqmc": "“甲”与“乙”的意思",
    "lcqmc_pair": "甲；乙",
    "sogou_log": "查询：天标题：天气",
}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(**changes):
    values = {
        "kind": "choice",
        "template": "{a};{middle}{b}",
        "metric": "accuracy",
        "answer": {"column": "y"},
        "labels": {"0": "no", "1": ["yes", "yeah"]},
    }
    return parse_task(Path("pair.toml"), values | changes)


def examples(path, task, config=LONG, vectors=0):
    return read_examples(path, task, TOKENIZER, config, vectors)


# --- ready tasks


def test_each_ready_task_has_a_row_here():
    assert ready_tasks() == sorted(ROWS)


@pytest.mark.parametrize("name", sorted(ROWS))
def test_ready_tasks_read_score_and_learn(tmp_path, name):
    task = replace(open_task(name), max_tokens=30)
    (example,) = examples(write(tmp_path / "rows.jsonl", ROWS[name]), task)
    if name in TEXTS:
        assert list(example.sources[0]) == encoder_ids(TEXTS[name], TOKENIZER, LONG)
    scorer = Scorer(tiny_model(LONG), TOKENIZER)
    report = evaluate_task(scorer, [example] * 2, task)
    assert report.rows == 2
    assert 0 <= report.score.value <= 100
    loss, count = scorer.loss([example], task)
    assert loss.item() > 0
    assert count >= 1
    assert make_slots(task, TOKENIZER, None, None, None).num_vectors in (20, 24, 40, 100)


def test_answers_are_found_by_place_and_by_text(tmp_path):
    ccpm, c3 = open_task("ccpm"), open_task("c3")
    row = ROWS["ccpm"] | {"answer": 1}
    (example,) = examples(write(tmp_path / "a.jsonl", row), ccpm)
    assert example.answer == 1
    assert example.words[1] == (tuple(TOKENIZER.encode("二")),)
    row = ROWS["c3"] | {"answer": "雨"}
    (example,) = examples(write(tmp_path / "b.jsonl", row), c3)
    assert example.answer == 1
    (example,) = examples(write(tmp_path / "c.jsonl", ROWS["math23k"]), open_task("math23k"))
    assert example.reference == "1+1"
    assert example.target == (*TOKENIZER.encode("1+1"), 260)


def test_the_files_of_c3_are_read_as_they_are(tmp_path):
    questions = [{"question": "天?", "choice": ["晴", "雨"], "answer": "雨", "id": "1"}] * 2
    path = tmp_path / "c3.json"
    path.write_text(json.dumps([[["天晴", "雨"], questions, "7"]]), encoding="utf-8")
    found = examples(path, open_task("c3"))
    assert [example.answer for example in found] == [1, 1]
    text = "问题：天?选项：一、晴；二、雨；文章：天晴\n雨"
    assert list(found[0].sources[0]) == encoder_ids(text, TOKENIZER, LONG)


def test_rankings_have_a_source_for_each_text_and_learn_the_better_one(tmp_path):
    task = open_task("sogou_log_ranking")
    (example,) = examples(write(tmp_path / "a.jsonl", ROWS["sogou_log_ranking"]), task)
    assert len(example.sources) == 3
    assert example.gains == (0, 2, 1)
    scorer = Scorer(tiny_model(LONG), TOKENIZER)
    (scores,) = scorer.label_scores([example], task)
    shares = torch.tensor([0.0, 2 / 3, 1 / 3])
    expected = -(shares * scores.log_softmax(0)).sum()
    assert scorer.loss([example], task)[0].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_text_that_is_too_long_is_cut_only_where_the_task_says(tmp_path):
    task = replace(open_task("c3"), max_input_tokens=80)
    row = ROWS["c3"] | {"text": "天" * 100}
    path = write(tmp_path / "a.jsonl", row)
    (example,) = examples(path, task)
    assert 78 <= len(example.sources[0]) <= 80
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: the text has \d+ tokens; the limit"):
        examples(path, replace(task, cut=None))


def test_vectors_take_room_from_the_text(tmp_path):
    path = write(tmp_path / "a.jsonl", {"a": "x" * 200, "b": "y", "y": 0})
    assert examples(path, pair(), DENSE)
    with pytest.raises(ValueError, match="the text has 203 tokens; the limit is 156"):
        examples(path, pair(), DENSE, 100)


def test_what_closes_an_answer_is_the_models_own():
    assert closing_id(TOKENIZER, replace(DENSE, continuation_sentinel=None)) == 1
    assert closing_id(TOKENIZER, replace(DENSE, continuation_sentinel=-1)) == 1
    assert closing_id(TOKENIZER, DENSE) == 260


# --- rows


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.csv", b"", "a.csv: holds no row"),
        ("a.csv", b"a,b,y\n", "holds no row"),
        ("a.csv", b"a,b\n1,2\n", "a.csv, line 2: has no column 'y'; it has a, b"),
        ("a.csv", b"a,b,y\n1,2\n", "a.csv, line 2: column 'y' has no value"),
        ("a.csv", b"a,b,y,y\n1,2,0,1\n", "a.csv, line 1: has two columns 'y'; rename one"),
        ("a.csv", b"a,b,y\n1,2,0\n1,\x00,0\n", "a.csv, line 3: has a zero byte"),
        ("a.csv", "a,b,y\n1,2,0\n".encode("utf-16"), "line 1: is not UTF-8 .*iconv -f UTF-16"),
        ("a.csv", b"a,b,y\n1,2,0,4\n", "a.csv, line 2: has more fields"),
        ("a.csv", b'a,b,y\n1,"2"x,0\n', "a.csv, line 2: "),
        ("a.csv", b"a,b,y\n1,2,5\n", "a.csv, line 2: label '5' is unknown; known: 0, 1"),
        ("a.tsv", "a\tb\ty\n一\t二\t0\n".encode("gb18030"), "a.tsv, line 2: is not UTF-8"),
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "a.jsonl, line 2: is no JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: holds no object"),
        ("a.jsonl", b'{"a": "1", "b": "2", "y": null}\n', "line 1: column 'y' has no value"),
        ("a.jsonl", b'{"a": "1", "b": "2", "y": 1, "y": 0}\n', "line 1: .*'y' is there twice"),
        ("a.jsonl", b'{"a": {"c": 1}, "b": "2", "y": 1}\n', "line 1: column 'a' holds .*'c'"),
        ("a.jsonl", b'{"a": ["c", null], "b": "2", "y": 1}\n', "'a' holds nothing; expected text"),
        ("a.jsonl", b'{"a": NaN, "b": "2", "y": 1}\n', "line 1: column 'a' holds nan; expected"),
        ("a.jsonl", b'{"a": "\\ud800", "b": "2", "y": 1}\n', "column 'a' holds half of a pair"),
        (
            "a.jsonl",
            b'{"a": ' + b"[" * 700 + b"1" + b"]" * 700 + b', "b": "2", "y": 1}\n',
            "line 1: column 'a' holds lists in lists",
        ),
        ("a.json", b"3", "a.json: holds no list"),
        ("a.json", b"[", "a.json: is no JSON"),
        ("a.json", b"[[1, 2]]", r"expected an object, or \[\[text\]"),
        ("a.txt", b"x", "a.txt: is of no known kind"),
    ],
)
def test_bad_files_are_told_by_file_and_line(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        examples(tmp_path / name, pair())


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    rows = [{"a": "x, y", "b": 'say "b"', "y": "1"}, {"a": "二", "b": "c", "y": "0"}]
    (tmp_path / "r.csv").write_text('a,b,y\n"x, y","say ""b""",1\n二,c,0\n', encoding="utf-8-sig")
    (tmp_path / "r.tsv").write_text('a\tb\ty\nx, y\tsay "b"\t1\n二\tc\t0\n', encoding="utf-8")
    write(tmp_path / "r.jsonl", *rows)
    (tmp_path / "r.json").write_text(json.dumps(rows), encoding="utf-8")
    crlf = (tmp_path / "r.csv").read_text(encoding="utf-8").replace("\n", "\r\n")
    (tmp_path / "crlf.CSV").write_text(crlf, encoding="utf-8", newline="")
    (tmp_path / "large.TSV").write_bytes((tmp_path / "r.tsv").read_bytes())
    for name in ("r.csv", "r.tsv", "r.jsonl", "r.json", "crlf.CSV", "large.TSV"):
        found = read_rows(tmp_path / name, ("a", "b", "y"))
        assert [row.values for row in found] == rows, name


def test_a_number_may_be_larger_than_any_float(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text('{"a": 1' + "0" * 400 + "}\n")
    (row,) = read_rows(path, ("a",))
    assert row.values["a"] == 10**400


def test_a_row_ends_where_its_line_does(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text('a,b,y\n"x\ny",b\u2028c\x85d,1\nz,e,7\n', encoding="utf-8")
    (first, second) = read_rows(path, ("a",))
    assert first.values == {"a": "x\ny", "b": "b\u2028c\x85d", "y": "1"}
    assert (first.line, second.line) == (3, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_folder_of_datasets_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"a": "x", "b": "y", "y": 1}]
    split = datasets.Dataset.from_list(rows)
    split.save_to_disk(str(tmp_path / "one"))
    assert [row.values for row in read_rows(tmp_path / "one", ("a",))] == rows
    datasets.DatasetDict({"train": split}).save_to_disk(str(tmp_path / "all"))
    with pytest.raises(ValueError, match="holds several splits"):
        read_rows(tmp_path / "all", ("a",))
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="is no folder of Hugging Face datasets"):
        read_rows(tmp_path / "none", ("a",))


class Narrow:
    """The byte tokenizer without capital letters, which become the unknown."""

    def __getattr__(self, name):
        return getattr(TOKENIZER, name)

    def encode(self, text):
        return [2 if 68 <= i < 94 else i for i in TOKENIZER.encode(text)]


def test_words_that_the_tokenizer_cannot_spell_are_told(tmp_path):
    path = write(tmp_path / "a.jsonl", {"a": "x", "b": "y", "y": 0})
    with pytest.raises(ConfigError, match="label '1': the tokenizer cannot spell 'YES'"):
        read_examples(path, pair(labels={"0": "no", "1": "YES"}), Narrow(), DENSE)
    writing = pair(kind="generate", metric="bleu", labels={}, template="{a}")
    write(path, {"a": "x", "y": "no"}, {"a": "x", "y": "NO"})
    with pytest.raises(ValueError, match="line 2: the tokenizer cannot spell 'NO'"):
        read_examples(path, writing, Narrow(), DENSE)
    with pytest.raises(ConfigError, match="cannot spell 'M', which marks"):
        make_slots(pair(template="{a}M{middle}{b}"), Narrow(), 0, 1, 0)


def test_labels_of_many_tokens_are_scored_in_full_up_to_the_limit(tmp_path):
    path = write(tmp_path / "a.jsonl", {"a": "x", "b": "y", "y": 0})
    long = "no" * 100
    task = pair(labels={"0": long, "1": long[:-1] + "t"})  # alike but for the last of 200 tokens
    (example,) = examples(path, task, DENSE)
    assert [len(word) for group in example.words for word in group] == [200, 200]
    scorer = Scorer(tiny_model(DENSE), TOKENIZER)
    (scores,) = scorer.label_scores([example], task)
    logs = scorer.target_logprobs(scorer.encode(example.sources), [0], [example.words[0][0]])[0]
    assert scores[0].item() == pytest.approx(logs.sum().item(), abs=1e-3)
    others = scorer.target_logprobs(scorer.encode(example.sources), [0], [example.words[1][0]])[0]
    assert torch.allclose(others[:-1], logs[:-1])
    assert scores[1].item() == pytest.approx(others.sum().item(), abs=1e-3)
    assert scores[0].item() != pytest.approx(scores[1].item(), abs=1e-3)
    with pytest.raises(ConfigError, match="label '0': 'nono.*' has 600 tokens; the limit is 246"):
        examples(path, pair(labels={"0": long * 3, "1": "yes"}), DENSE, 10)
    writing = pair(kind="generate", metric="bleu", labels={}, template="{a}", max_tokens=999)
    write(path, {"a": "x", "y": long * 3})
    with pytest.raises(ValueError, match="line 1: 'nono.*' has 600 tokens; the limit is 256"):
        examples(path, writing, DENSE)


def test_labels_that_have_the_same_tokens_are_told(tmp_path):
    path = write(tmp_path / "a.jsonl", {"a": "x", "b": "y", "y": 0})
    with pytest.raises(ConfigError, match="tokens of 'no' stand for the labels '0' and '1'"):
        examples(path, pair(labels={"0": ["nay", "no"], "1": ["yes", "no"]}))


def test_a_label_that_would_never_be_chosen_is_told(tmp_path):
    """What a text begins with is at least as likely as the text."""
    path = write(tmp_path / "a.jsonl", {"a": "x", "b": "y", "y": 0})
    for words in ({"0": "no", "1": "not"}, {"0": ["yes", "no"], "1": ["not", "nor"]}):
        with pytest.raises(ConfigError, match="label '1' would never be chosen: 'not' begins as"):
            examples(path, pair(labels=words))
        assert examples(path, pair(labels=words, by="mean"))
        paired = pair(labels=words, template="{a}{b}", continuation="{label}!")
        assert examples(path, paired)  # another text follows
    assert examples(path, pair(labels={"0": ["no", "yes"], "1": ["not", "yet"]}))  # yet may win
    assert examples(path, pair(labels={"0": "no", "1": ["not", "yeti"], "2": "yet"}))
    assert examples(path, pair(labels={"0": "no", "1": ["not", "nott"]}))  # would count twice


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"a": "x", "y": " "}, {"kind": "generate"}, "line 1: y is empty"),
        ({"a": "x", "y": ["b"]}, {"kind": "generate"}, "line 1: y is a list; expected a text"),
        ({"d": ["x", "z"], "y": ["1", 0]}, {"kind": "rank"}, "y holds '1'; expected numbers"),
        ({"d": ["x", "z"], "y": [-1, 0]}, {"kind": "rank"}, "y holds -1; expected numbers"),
        ({"a": "x", "y": "long"}, {"kind": "generate", "max_tokens": 3}, "has 5 tokens; max_tok"),
        ({"a": ["x"] * 9, "y": 0}, {"lists": {"a": {"numbers": "12"}}}, "9 items; there are 2"),
        ({"a": "x", "y": 0}, {"answer": {"column": "y", "choices_from": "a"}}, "a is no list"),
        ({"a": ["x"], "y": 0}, {"answer": {"column": "y", "choices_from": "a"}}, "a is no list of"),
        (
            {"a": ["x", "z"], "y": 2},
            {"answer": {"column": "y", "choices_from": "a"}},
            "'2' is unknown",
        ),
        ({"a": ["x"] * 99, "y": 0}, {"cut": "a", "max_input_tokens": 9}, "a, which is a list"),
        ({"d": ["x"], "y": [1]}, {"kind": "rank"}, "1 texts with 1 gains"),
        ({"d": "x", "y": [1]}, {"kind": "rank"}, "d and y must be lists"),
    ],
)
def test_rows_that_cannot_be_asked_are_told(tmp_path, row, changes, message):
    changes = {"template": "{a}", "labels": {"0": "no", "1": "yes"}} | changes
    kind = changes.get("kind", "choice")
    if kind == "generate":
        changes |= {"metric": "bleu", "labels": {}}
    if kind == "rank":
        changes |= {
            "metric": "mrr",
            "template": "{text}",
            "labels": {"0": "no"},
            "answer": {"column": "d", "gains": "y"},
        }
    if "choices_from" in changes.get("answer", {}):
        changes["labels"] = {}
    with pytest.raises(ValueError, match=message):
        examples(write(tmp_path / "a.jsonl", row), pair(**changes), DENSE)


def test_a_text_without_the_mark_is_told(tmp_path):
    task = pair(template="{a}{b}")
    assert task.mark == ""
    (tmp_path / "a.jsonl").write_text('{"a": "x", "b": "y", "y": 0}\n', encoding="utf-8")
    assert examples(tmp_path / "a.jsonl", task)
    with pytest.raises(ConfigError, match="has no {middle} in its template"):
        make_slots(task, TOKENIZER, 1, 1, 0)
    with pytest.raises(ConfigError, match="at least one vector"):
        make_slots(task, TOKENIZER, 0, 0, 0)


# --- task files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "guess"}, "kind is 'guess'; allowed: choice, generate, rank"),
        ({"metric": "bleu"}, "metric is 'bleu'; allowed: accuracy"),
        ({"by": "sum"}, "by is 'sum'"),
        ({"loss": "all"}, "loss is 'all'"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": 0}, "temperature is 0"),
        ({"templat": "x"}, "unknown key templat"),
        ({"template": 1}, "template is 1; expected a text"),
        ({"template": "{middle}{a}"}, "needs a text that marks the place"),
        ({"template": "{a};{middle};{middle}"}, "more than once"),
        ({"answer": {"colum": "y"}}, "answer: unknown key colum"),
        ({"answer": {}}, "answer: .*column"),
        ({"answer": 1}, "answer is 1; expected a table"),
        ({"labels": {}}, "needs .labels. or answer.choices_from"),
        ({"labels": {"0": [], "1": "yes"}}, "label '0' has no words"),
        ({"labels": {"0": "no"}}, "a choice among one label is always right"),
        ({"labels": {"0": 3}}, "labels: 0 is 3"),
        ({"lists": {"a": 3}}, "lists.a is 3"),
        ({"lists": {"a": {"numbers": 3}}}, "lists.a: numbers is 3"),
        ({"cut": "c"}, "cut is 'c'; expected a field of the template"),
        ({"slots": {"left": 3}}, "slots: left = 3"),
        ({"kind": "generate", "metric": "bleu"}, "a generate task has none"),
        ({"kind": "rank", "metric": "mrr"}, "a ranking needs one label"),
        ({"kind": "rank", "metric": "mrr", "labels": {"r": "r"}}, "answer.gains or answer.neg"),
    ],
)
def test_task_files_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ConfigError, match=f"pair.toml: .*{message}"):
        pair(**changes)


def test_a_task_that_is_not_known_is_told_with_those_that_are(tmp_path):
    with pytest.raises(ConfigError, match="task 'x' is not known; give a .toml file or .*adgen"):
        open_task("x")
    with pytest.raises(ConfigError, match="cannot be read as TOML"):
        open_task(str(tmp_path / "x.toml"))


def test_lists_are_written_item_by_item():
    how = ListFormat(item="{number}.{item}", join=" ", numbers=("I", "II"))
    assert format_list(["a{0}", "b"], how) == "I.a{0} II.b"
    assert format_list([["k", "v"]], ListFormat(item="{0}={1}")) == "k=v"
