"""The benchmark of prompt tuning: its runs, what is made of them, and what steps cost."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from engine.adapters import Slots
from engine.checkpoint import save_model
from server.__main__ import build_app
from tests.tiny import MOE, byte_tokenizer, tiny_model
from training import bench_tuning
from training.bench_tuning_arms import QUICK, few_arms, main_arms, mask_arms, place_arms, spread
from training.bench_tuning_costs import find_cost, head, make_probes
from training.bench_tuning_findings import (
    Findings,
    find_goals,
    gap,
    hits_of,
    points,
    score,
    summary,
)
from training.bench_tuning_report import seconds_to_best, write_report
from training.bench_tuning_runs import Workshop
from training.growth_files import read_model_config
from training.metrics_text import Interval
from training.process_memory import memory_bytes, peak_memory, reset_peak
from training.task_examples import Example
from training.tune_cost import Cost, Probe, measure_cost, take_steps

TINY = replace(MOE, max_positions=256)
BUDGET = replace(QUICK, train_rows=8, pairs=9)
FULL_BYTES, PROMPT_BYTES = 1000, 400


def fake_cost(probe):
    return Cost(FULL_BYTES if probe.full else PROMPT_BYTES, 0.5)


def write_data(folder):
    folder.mkdir()
    for name, count in (("train", 20), ("dev", 6), ("test", 8)):
        rows = [{"text": "好差"[i % 2] * (1 + i % 3), "label": 1 - i % 2} for i in range(count)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    text = "".join("".join(f"{name}在{i}号地方。" for i in "一二三四") + "\n" for name in "甲乙丙")
    (folder / "texts.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    data = write_data(root / "data")
    save_model(tiny_model(TINY), root / "model")
    said = []
    words = (root / "model", data, data / "texts.txt", root / "work", [3, 4], BUDGET)
    findings = bench_tuning.bench_tuning(*words, said.append, fake_cost)
    return words, findings, said


def test_all_arms_are_run_and_found_again(made):
    words, findings, said = made
    pairs, few = few_arms(BUDGET)
    once = [pairs, *place_arms(BUDGET), *mask_arms(BUDGET)]
    expected = {arm.name: 2 for arm in (*main_arms(BUDGET), *few)}
    expected |= {arm.name: 1 for arm in once}
    runs = {name: len(found) for name, found in findings.runs.items()}
    assert runs == expected
    assert findings.num_rows == (8, 6, 8)
    assert findings.runs["prompt"][0].num_trained == BUDGET.vectors * TINY.d_model
    full, joint = findings.runs["full"][0], findings.runs["joint"][0]
    assert joint.num_trained == full.num_trained + BUDGET.vectors * TINY.d_model
    assert len(said) == sum(runs.values()) + 6
    again = []
    found = bench_tuning.bench_tuning(*words, again.append, fake_cost)
    assert again == []
    assert summary(found) == summary(findings)


def test_another_parent_makes_another_run(made):
    words, _, _ = made
    said = []
    changed = replace(BUDGET, prompt_steps=1)
    bench_tuning.bench_tuning(*words[:4], [3], changed, said.append, fake_cost)
    assert [line.split(" seed")[0] for line in said] == ["prompt", "joint"]


class Stopping(list):
    """Rows that stop whoever reads them, once, when so many have been read."""

    left = -1

    def __getitem__(self, index):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_a_run_that_was_stopped_goes_on_to_the_same(made, tmp_path):
    (model, data, texts, *_), _, _ = made
    tokenizer = byte_tokenizer()
    config = read_model_config(model)
    arm = replace(main_arms(BUDGET)[0], steps=4)
    prompts = []
    for name, left in (("whole", -1), ("stopped", 7)):
        folder = tmp_path / name
        folder.mkdir()
        rows = bench_tuning.read_all(data, texts, folder, tokenizer, config, BUDGET)
        train = Stopping(rows["all"].data.train)
        train.left = left
        rows["all"] = replace(rows["all"], data=replace(rows["all"].data, train=train))
        workshop = Workshop(model, tokenizer, rows, folder, lambda _: None)
        if left > 0:
            with pytest.raises(KeyboardInterrupt):
                workshop.run(arm, 3)
        record = workshop.run(arm, 3)
        assert [step for step, _, _ in record.curve] == [2, 4]
        assert train.left == left - (8 if left < 0 else 7 + 4)  # the last two steps again
        assert not list((folder / "states").iterdir())
        prompts.append((folder / "prompt-seed3.safetensors").read_bytes())
    assert prompts[0] == prompts[1]


def test_no_seed_is_refused(made):
    words, _, _ = made
    with pytest.raises(ValueError, match="at least one"):
        bench_tuning.bench_tuning(*words[:4], [], BUDGET, print, fake_cost)


def test_the_report_has_all_that_was_found(made, tmp_path):
    _, findings, _ = made
    write_report(findings, BUDGET, "tiny", tmp_path / "out")
    text = (tmp_path / "out" / "tuning.md").read_text(encoding="utf-8")
    for name in ("front+middle+back", "text cannot see prompt", "full fine-tuning", "majority"):
        assert name in text
    assert "| at most 0.6 of its memory (adam) | 0.40 | met |" in text
    assert (tmp_path / "out" / "tuning.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((tmp_path / "out" / "tuning.json").read_text(encoding="utf-8"))
    assert found["scores"].keys() == findings.scores.keys()
    assert "scores" not in found["runs"]["prompt"][0]


def test_vectors_are_spread_over_places():
    assert spread(20, "front+middle+back", 9) == Slots(front=7, middle=7, back=6, middle_mark=9)
    assert spread(5, "front+back", 9) == Slots(front=3, back=2)
    for arm in place_arms(BUDGET):
        assert spread(arm.vectors, arm.places, 9).num_vectors == BUDGET.vectors


# --- what the findings say


def hits(*rows):
    return np.array([[character == "1" for character in row] for row in rows])


def test_scores_and_gaps_have_intervals_over_rows_and_seeds():
    examples = [Example(0, ((1,),), answer=answer) for answer in (0, 1, 1)]
    found = hits_of([[[0.0, -1.0], [-1.0, 0.0], [0.0, -1.0]]], examples)
    assert found.tolist() == [[True, True, False]]
    even = score(hits("1010" * 25))
    assert even.value == 0.5
    assert 0.38 < even.low < 0.43 < 0.57 < even.high < 0.62  # +- 2 standard errors of 0.05
    apart = score(hits("1" * 100, "0" * 100))  # seeds differ, rows do not
    assert (apart.low, apart.high) == (0, 1)
    same = gap(hits("1010" * 25), hits("1010" * 25))  # the same rows are drawn for both
    assert same == Interval(0, 0, 0)
    lower = gap(hits("1111" * 25), hits("1110" * 25))
    assert 0 < lower.low < lower.value == 0.25 < lower.high
    assert points(lower).startswith("25.0 [")
    assert points(Interval(0.5)) == "50.0"


def test_goals_are_met_by_every_seed_or_missed(made):
    _, findings, _ = made
    costs = {"model prompt adam": Cost(61, 1.0), "model full adam": Cost(100, 1.0)}
    full = hits("1" * 100, "1" * 100)
    for worst, is_met in (("1" * 97 + "000", True), ("1" * 96 + "0000", False)):
        found = {"full": full, "prompt": hits("1" * 100, worst)}
        goals = find_goals(10, findings.runs, found, gap(full, found["prompt"]), costs)
        assert [goal.is_met for goal in goals] == [is_met, True, False]
        assert "by seed 0.0, " in goals[0].measured
    assert isinstance(findings, Findings)
    first = findings.runs["prompt"][0]
    assert seconds_to_best(replace(first, best_step=4, curve=[(2, 0.1, 5.0), (4, 0.2, 9.0)])) == 9


# --- costs


def test_a_probe_counts_what_training_holds(tmp_path):
    data = write_data(tmp_path / "data")
    wide = replace(TINY, d_model=128, d_ff=512, num_heads=4, num_experts=0)
    save_model(tiny_model(wide), tmp_path / "model")
    probes = make_probes(tmp_path / "model", data, "sentiment_zh", tmp_path, BUDGET)
    assert len(probes) == 6
    weights_bytes = 4 * sum(one.numel() for one in tiny_model(wide).parameters())
    probe = replace(probes["model full adam"], run=str(tmp_path / "run"))
    cost = measure_cost(probe)
    assert cost.peak_bytes > 4 * weights_bytes  # weights, best ones, gradients, two moments
    assert cost.peak_bytes < 40 * weights_bytes
    assert cost.step_s > 0
    here = take_steps(replace(probes["model prompt adam"], run=str(tmp_path / "here")))
    assert here.step_s > 0
    said = []
    known = find_cost(tmp_path, "a b", probe, fake_cost, said.append)
    assert find_cost(tmp_path, "a b", probe, measure_cost, said.append) == known
    assert len(said) == 1
    with pytest.raises(ValueError, match="a probe of memory failed: .*no-model"):
        measure_cost(replace(probe, model="no-model"))


def test_the_peak_begins_again(tmp_path):
    block = torch.ones(30_000_000)
    assert memory_bytes("VmHWM") >= memory_bytes("VmRSS") - 2**20
    assert peak_memory(torch.device("cpu")) >= block.numel() * 4
    del block
    reset_peak()
    assert memory_bytes("VmHWM") < memory_bytes("VmRSS") + 2**25
    path = tmp_path / "a.txt"
    path.write_text("1\n2\n3\n", encoding="utf-8")
    assert head(path, 2, tmp_path / "b.txt").read_text(encoding="utf-8") == "1\n2\n"


def test_the_command_says_what_is_missing(tmp_path):
    save_model(tiny_model(TINY), tmp_path / "model")
    words = ["bench-tuning", str(tmp_path / "model"), str(tmp_path), str(tmp_path / "work")]
    words += ["--texts", str(tmp_path), "--out", str(tmp_path / "out"), "--quick"]
    done = CliRunner().invoke(build_app("bench-tuning"), words)
    assert isinstance(done.exception, FileNotFoundError)
    assert "train.jsonl" in str(done.exception)
    assert isinstance(Probe(model="a", data="b", task="c", run="d", vectors=1), Probe)
