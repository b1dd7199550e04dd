"""Several prompts that choose together, and what is drawn of choices."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from engine.adapters import Slots, load_adapter
from engine.checkpoint import save_model
from engine.errors import CheckpointError, ConfigError
from server.__main__ import build_app
from tests.tiny import DENSE, byte_tokenizer, tiny_model
from training.task_eval import Replies, ask, evaluate_task, judge
from training.task_examples import Example
from training.task_plots import plot_confusion
from training.tasks import parse_task
from training.tune import TuneSettings
from training.tune_ensemble import (
    check_vote,
    combine,
    evaluate_ensemble,
    judge_ensemble,
    tune_members,
)
from training.tune_model import Scorer, SoftPrompt
from training.tune_run import TunePlan, run_tune

TOKENIZER = byte_tokenizer()


def task(**changes):
    values = {
        "kind": "choice",
        "template": "{text}",
        "metric": "accuracy",
        "loss": "labels",
        "answer": {"column": "label"},
        "labels": {"0": "no", "1": "yes", "ja": "so"},
        "slots": {"front": 2},
    }
    return parse_task(Path("three.toml"), values | changes)


THREE = task()
WORDS = tuple((tuple(TOKENIZER.encode(word)),) for word in ("no", "yes", "so"))
EXAMPLES = [
    Example(i, ((60 + i, 61, 62 + i % 3, 1),), WORDS, ("0", "1", "ja"), i % 3) for i in range(7)
]


def random_scorer(seed):
    generator = torch.Generator().manual_seed(seed)
    prompt = SoftPrompt(torch.randn(2, 32, generator=generator), Slots(front=2))
    return Scorer(tiny_model(DENSE), TOKENIZER, prompt)


def write_rows(path, labels="01"):
    rows = [{"text": "ab"[i % 2] * 3, "label": labels[i % len(labels)]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def plan(tmp_path, **settings):
    rows = write_rows(tmp_path / "rows.jsonl")
    save_model(tiny_model(DENSE), tmp_path / "model")
    wanted = {"steps": 4, "rows": 4, "eval_every": 2, "init": "random", "seed": 5}
    return TunePlan(
        model=tmp_path / "model",
        data=rows,
        dev=rows,
        out=tmp_path / "adapters" / "pair",
        run=tmp_path / "run",
        task=THREE,
        settings=TuneSettings(**(wanted | settings)),
    )


def test_the_mean_of_scores_and_the_majority_of_choices():
    members = [Replies([], [row]) for row in ([0.0, -1.0, -9.0], [0.0, -1.0, -9.0], [-9.0, 0, 0])]
    assert combine(members, "mean").scores == [pytest.approx([-3, -2 / 3, -6])]
    (voted,) = combine(members, "majority").scores
    assert max(range(3), key=voted.__getitem__) == 0
    tied = [Replies([], [row]) for row in ([0.0, -1.0, -9.0], [-9.0, 0.0, -9.0])]
    (voted,) = combine(tied, "majority").scores  # a vote each; label 1 has the higher mean
    assert max(range(3), key=voted.__getitem__) == 1
    assert voted[0] > voted[2]


def test_members_are_asked_as_alone():
    scorers = [random_scorer(seed) for seed in range(3)]
    found = judge_ensemble(scorers, EXAMPLES, THREE, "mean", rows=3)
    assert found.members == [evaluate_task(scorer, EXAMPLES, THREE, 3) for scorer in scorers]
    scores = torch.tensor([ask(scorer, EXAMPLES, THREE, 3).scores for scorer in scorers])
    expected = [("0", "1", "ja")[i] for i in scores.mean(0).argmax(1)]
    assert list(found.together.answers) == expected
    same = judge_ensemble(scorers[:1] * 3, EXAMPLES, THREE, "majority", rows=3)
    assert same.together == same.members[0]


def test_what_cannot_be_voted_on_is_refused(tmp_path):
    write = task(kind="generate", metric="exact_match", labels={})
    for kind, vote in ((write, "mean"), (THREE, "loudest")):
        with pytest.raises(ConfigError, match="vote is 'loudest'|choose among labels"):
            check_vote(kind, vote)
    with pytest.raises(ConfigError, match="behind a mask none is written"):
        tune_members(plan(tmp_path, mask="text_blind"), 2)
    with pytest.raises(ConfigError, match="leave out --full or --members"):
        tune_members(plan(tmp_path, full=True), 2)


def test_members_are_versions_of_one_adapter_and_a_stopped_run_goes_on(tmp_path):
    wanted = plan(tmp_path)
    outcomes, found = tune_members(wanted, 2)
    folders = sorted(wanted.out.iterdir())
    assert [folder.name for folder in folders] == ["1", "2"]
    adapters = [load_adapter(folder, DENSE, torch.float32) for folder in folders]
    assert [adapter.version for adapter in adapters] == ["1", "2"]
    assert [outcome.adapter for outcome in outcomes] == folders
    assert all(outcome.peak_bytes > 0 for outcome in outcomes)
    alone = replace(wanted, out=tmp_path / "alone", run=tmp_path / "alone.run")
    alone = replace(alone, settings=replace(alone.settings, seed=6))
    run_tune(alone)
    second = load_adapter(alone.out, DENSE, torch.float32)
    assert torch.equal(second.prompt_PD, adapters[1].prompt_PD)
    assert not torch.equal(second.prompt_PD, adapters[0].prompt_PD)
    again = evaluate_ensemble(wanted.model, wanted.data, THREE, folders)
    assert again == found
    with pytest.raises(CheckpointError, match="is there already"):
        tune_members(wanted, 2)
    elsewhere = replace(wanted, out=tmp_path / "b")  # the same run folder: all is tuned already
    tune_members(elsewhere, 2)
    assert torch.equal(
        load_adapter(tmp_path / "b" / "2", DENSE, torch.float32).prompt_PD, second.prompt_PD
    )


def test_the_commands_tune_and_ask_several(tmp_path):
    wanted = plan(tmp_path)
    rows, model = str(wanted.data), str(wanted.model)
    file = tmp_path / "three.toml"
    file.write_text(
        'kind = "choice"\ntemplate = "{text}"\nmetric = "accuracy"\nslots = { front = 2 }\n'
        'answer = { column = "label" }\nlabels = { 0 = "no", 1 = "yes", "好" = "so" }\n',
        encoding="utf-8",
    )
    words = ["tune", model, rows, "--task", str(file), "--out", str(wanted.out), "--dev", rows]
    done = CliRunner().invoke(build_app("tune"), [*words, "--steps", "2", "--members", "2"])
    assert done.exit_code == 0, done.output
    assert "MiB held at most" in done.output
    words = ["eval-task", model, rows, "--task", str(file), "--adapter", str(wanted.out / "1")]
    words += ["--also", str(wanted.out / "2"), "--vote", "majority", "--json"]
    words += ["--confusion", str(tmp_path / "c.png")]
    done = CliRunner().invoke(build_app("eval-task"), words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == 8
    assert sum(map(sum, found["confusion"])) == 8
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")
    words = ["eval-task", model, rows, "--task", str(file), "--also", str(wanted.out / "2")]
    done = CliRunner().invoke(build_app("eval-task"), words)
    assert done.exit_code == 2
    assert "give --adapter first" in done.output


def test_confusion_counts_rows_by_label_and_answer(tmp_path):
    scores = [[0.0, -1.0, -1.0]] * 5 + [[-1.0, 0.0, -1.0]] * 2
    report = judge(THREE, EXAMPLES, Replies([], scores))
    assert [one.label for one in report.labels] == ["0", "1", "ja"]
    # rows 0..4 are answered 0, rows 5 and 6 are answered 1; their labels are 0 1 2 0 1 2 0
    assert report.confusion == ((2, 1, 0), (2, 0, 0), (1, 1, 0))
    assert report.as_json()["confusion"] == report.confusion
    plot_confusion(report, tmp_path / "c.png")
    assert (tmp_path / "c.png").exists()
    with pytest.raises(ConfigError, match="chooses no labels"):
        plot_confusion(replace(report, confusion=()), tmp_path / "d.png")
