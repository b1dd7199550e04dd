"""The benchmark of inheritance: its arithmetic on made-up curves, and a tiny run of the whole."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from engine.model.initial import initialize
from engine.model.transformer import Transformer
from server.__main__ import build_app
from training import bench_inheritance_runs
from training.bench_inheritance import bench_inheritance, cost_goals, teaching_goals
from training.bench_inheritance_arms import (
    LARGE,
    QUICK,
    SMALL,
    Budget,
    grown_arms,
    small_text_arms,
    source_arms,
    sparse_arms,
    wide_arms,
)
from training.bench_inheritance_curves import (
    best_loss,
    compare_at,
    compare_costs,
    compare_ends,
    compare_steps,
    cost_to,
    falling,
    interval,
    loss_after,
    loss_at,
    smooth,
)
from training.bench_inheritance_report import ratio_cell
from training.bench_inheritance_runs import Arm, Point, Record, Workshop
from training.bench_inheritance_steps import (
    Shape,
    Texts,
    distillation_loss,
    draw_windows,
    make_optimizer,
    read_texts,
    update,
)
from training.flops import forward_flops, training_flops
from training.growth import GrowthPlan

TINY = Shape(rows=2, source_length=4, target_length=6, warmup_steps=2, eval_every=2, eval_rows=4)


def curve(losses, *, flops=10.0, charged=(0.0, 0.0), seed=1):
    """A run with one evaluation a step, each of which costs `flops` and twice as many seconds."""
    points = [Point(i, i * flops, 2 * i * flops, loss) for i, loss in enumerate(losses)]
    return Record(name="made-up", seed=seed, points=points, charged=charged)


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(1)
    return Texts(rng.integers(3, 9, 5000), rng.integers(3, 9, 500), 600)


def workshop(folder, texts, said):
    return Workshop(folder, texts, TINY, said.append)


def arm(name, **fields):
    return Arm(name=name, **{"config": SMALL, "steps": 4, "rate": 1e-3} | fields)


def test_smoothing_is_the_centred_median():
    assert smooth([9, 3, 5, 4, 1]) == [9, 5, 4, 4, 1]
    assert smooth([9.0]) == [9.0]
    assert smooth([5, 4, 3, 9, 3, 2, 1]) == [5, 4, 4, 3, 3, 2, 1]  # the spike is gone


def test_a_curve_never_rises():
    assert [p.loss for p in falling(curve([5, 4, 4.5, 4.6, 4.7]).points)] == [5, 4.5, 4.5, 4.5, 4.5]


def test_costs_lie_in_between_points():
    run = curve([6, 5, 4, 3, 2])  # a straight line, which the median leaves alone
    assert cost_to(run, 3.5).flops == pytest.approx(25.0)
    assert cost_to(run, 3.5).seconds == pytest.approx(50.0)
    assert cost_to(run, 1.9) is None
    assert cost_to(run, 6.5).flops == 0.0
    assert loss_at(run, 0.625) == pytest.approx(3.5)
    assert loss_at(run, 1.0) == 2.0
    assert loss_after(run, 99.0) == 2.0


def test_a_ratio_charges_what_came_before():
    scratch = curve([6, 5, 4, 3, 2])  # at 3/4 of 40: loss 3
    arm = curve([4, 3.5, 3, 2.5, 2], flops=5.0, charged=(9.0, 12.0))
    ratio = compare_costs([arm], [scratch], 0.75)
    assert ratio.free.values == pytest.approx((10 / 30,))
    assert ratio.charged.values == pytest.approx((19 / 30,))
    assert ratio.free_seconds.values == pytest.approx((20 / 60,))
    assert ratio.charged_seconds.values == pytest.approx((32 / 60,))
    assert ratio.is_fair
    assert ratio.reached == 1
    assert ratio_cell(ratio, 1) == "0.33 / 0.63"


def test_scratch_costs_as_much_as_itself():
    scratch = curve([6, 5, 4, 3, 2])
    ratio = compare_costs([scratch], [scratch], 0.75)
    assert ratio.free.mean == ratio.charged.mean == 1.0


def test_a_loss_above_the_start_is_no_saving():
    scratch = curve([6, 5, 4, 3, 2])
    ratio = compare_costs([curve([3, 2.9, 2.8])], [scratch], 0.75)
    assert not ratio.is_fair
    assert ratio_cell(ratio, 1) == "begins below"
    assert not any(goal.is_met for goal in cost_goals(ratio))


def test_a_loss_that_one_seed_misses_has_no_ratio():
    scratch = curve([6, 5, 4, 3, 2])
    slow = curve([6, 5.5, 5, 4.5, 4])
    ratio = compare_costs([scratch, slow], [scratch, scratch], 0.75)
    assert ratio.free is None
    assert ratio.reached == 1
    assert ratio_cell(ratio, 2) == "reached by 1 of 2"
    assert [goal.is_met for goal in cost_goals(ratio)] == [False, False]


def test_intervals_are_students():
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3))
    assert found.text(1) == "2.0 [-0.5, 4.5]"
    assert interval([2.0]).text(1) == "2.0"
    with pytest.raises(ValueError, match="0 values; an interval takes 1 to 10"):
        interval([])
    with pytest.raises(ValueError, match="11 values"):
        interval([1.0] * 11)


def test_goals_are_met_by_every_seed_or_missed():
    scratch = curve([6, 5, 4, 3, 2])
    arm = curve([4, 3.5, 3, 2.5, 2], flops=5.0, charged=(12.0, 0.0))  # 10 and 22 of 30
    free, charged = cost_goals(compare_costs([arm], [scratch], 0.75))
    assert (free.is_met, charged.is_met) == (True, True)
    dear = replace(arm, charged=(16.0, 0.0))
    free, charged = cost_goals(compare_costs([dear], [scratch], 0.75))
    assert (free.is_met, charged.is_met) == (True, False)
    steps, nats = teaching_goals(interval([0.4]), interval([0.1]))
    assert (steps.is_met, nats.is_met) == (True, False)
    assert not teaching_goals(None, interval([0.2]))[0].is_met
    steps, nats = teaching_goals(interval([0.3, 0.5]), interval([0.3, 0.1]))  # good in the mean
    assert (steps.is_met, nats.is_met) == (False, False)


def test_runs_are_compared_at_equal_cost():
    short, long = curve([4, 3, 2]), curve([4, 3.5, 3, 2.5, 2])
    assert compare_at([short], [long]).mean == pytest.approx(1.0)  # 3 - 2
    assert compare_ends([short], [long]).mean == 0.0


def test_steps_to_the_best_loss_of_a_run_that_overfits():
    alone = curve([6, 5, 4, 3, 3.5, 4, 4.5])  # best smoothed: 4, first at step 2
    taught = curve([6, 4, 3.9, 3.8, 3.7, 3.6, 3.5])
    assert best_loss(alone).step == 2
    share, reached = compare_steps([taught], [alone])
    assert (share.mean, reached) == (0.5, 1)
    assert compare_steps([curve([6, 5, 5, 5])], [alone]) == (None, 0)


def test_a_run_was_not_evaluated_at_every_step():
    assert curve([3, 2]).at(1).loss == 2
    with pytest.raises(ValueError, match="not evaluated at step 7"):
        curve([3, 2]).at(7)


def test_texts_are_bytes_with_newlines(tmp_path):
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("A<n>B\n" * 40, encoding="utf-8")
    texts = read_texts(tmp_path)
    assert texts.train[:4].tolist() == [68, 13, 69, 13]
    (tmp_path / "valid" / "a.txt").unlink()
    with pytest.raises(ValueError, match="infmoe corpus"):
        read_texts(tmp_path)


def test_windows_depend_on_seed_and_number_only(texts):
    first = draw_windows(texts.train, 1, 5, TINY, 3)
    assert first.shape == (3, 10)
    assert torch.equal(first, draw_windows(texts.train, 1, 5, TINY, 3))
    assert not torch.equal(first, draw_windows(texts.train, 1, 6, TINY, 3))
    with pytest.raises(ValueError, match="the text has 9 bytes, a window 10"):
        draw_windows(texts.train[:9], 1, 0, TINY, 1)


def test_distillation_mixes_both_losses():
    torch.manual_seed(1)
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    labels = torch.randint(7, (5,))
    plain = -student.log_softmax(-1)[range(5), labels].mean()
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    apart = 4 * (p * (p / q).log()).sum(-1).mean()
    found = distillation_loss(student, teacher, labels, 0.25)
    assert found == pytest.approx(float(0.75 * plain + 0.25 * apart), rel=1e-5)


def test_a_run_is_made_once_and_again_if_its_arm_or_its_parent_changes(tmp_path, texts):
    said = []
    shop = workshop(tmp_path, texts, said)
    source = arm("source", keep=(4,))
    pad = arm("pad", config=LARGE, parent="source", parent_step=4, growth=GrowthPlan(target=LARGE))
    first, child = shop.run(source, 1), shop.run(pad, 1)
    assert len(said) == 2
    assert child.points[0].loss == pytest.approx(first.points[-1].loss, abs=1e-5)  # exact growth
    assert child.charged == (first.points[-1].flops, first.points[-1].seconds)
    again = workshop(tmp_path, texts, said)
    assert again.run(source, 1) == first
    assert again.run(pad, 1) == child
    assert len(said) == 2
    again.run(replace(source, rate=2e-3), 1)
    assert again.run(pad, 1) != child
    assert len(said) == 4


def test_a_run_whose_state_is_gone_is_made_again_to_the_same_losses(tmp_path, texts):
    said = []
    shop = workshop(tmp_path, texts, said)
    first = shop.run(arm("source", keep=(4,)), 1)
    (shop.state_folder("source", 4, 1) / "state.safetensors").unlink()
    second = shop.run(arm("source", keep=(4,)), 1)
    assert len(said) == 2
    assert [p.loss for p in first.points] == [p.loss for p in second.points]


def test_continuing_a_run_equals_not_stopping_it(tmp_path, texts):
    shop = workshop(tmp_path, texts, [])
    shape = replace(TINY, warmup_steps=1)
    shop.shape = shape
    whole = shop.run(arm("whole", steps=8), 1)
    shop.run(arm("half", keep=(4,)), 1)
    rest = arm("rest", parent="half", parent_step=4, moments="carry", first_batch=4)
    assert shop.run(rest, 1).points[-1].loss == pytest.approx(whole.points[-1].loss, abs=1e-6)


@pytest.mark.parametrize("stopped_at", [3, 7])
def test_a_run_that_was_stopped_goes_on_to_the_same_losses(
    tmp_path, texts, monkeypatch, stopped_at
):
    monkeypatch.setattr(bench_inheritance_runs, "SAVE_S", 0.0)
    (tmp_path / "cut").mkdir()
    said = []
    mixed = {"config": replace(SMALL, num_experts=2), "balanced_until": 0.5, "steps": 8}
    whole = workshop(tmp_path, texts, said).run(arm("long", **mixed), 1)
    shop = workshop(tmp_path / "cut", texts, said)
    steps = []

    def stop(*given):
        steps.append(given)
        if len(steps) > stopped_at:
            raise KeyboardInterrupt
        return update(*given)

    with monkeypatch.context() as patch:
        patch.setattr(bench_inheritance_runs, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            shop.run(arm("long", **mixed), 1)
    steps.clear()
    stopped_at = 99
    with monkeypatch.context() as patch:
        patch.setattr(bench_inheritance_runs, "update", stop)
        resumed = shop.run(arm("long", **mixed), 1)
    assert len(steps) < 8  # the state was taken up
    assert [p.loss for p in resumed.points] == [p.loss for p in whole.points]
    assert [p.step for p in resumed.points] == [p.step for p in whole.points]
    assert not list(tmp_path.glob("cut/states/*under-way"))


def test_a_state_under_way_of_another_arm_is_not_taken_up(tmp_path, texts, monkeypatch):
    monkeypatch.setattr(bench_inheritance_runs, "SAVE_S", 0.0)
    shop = workshop(tmp_path, texts, [])
    slow, fast = arm("long"), arm("long", rate=2e-3)
    shop.arms["long"] = slow
    model = Transformer(SMALL)
    initialize(model, 1)
    optimizer = make_optimizer(model, 1e-3)
    shop._keep_under_way(slow, 1, model, optimizer, [Point(2, 1.0, 1.0, 9.0)])
    assert shop.run(fast, 1).points[1].loss < 9.0


def test_operations_count_teachers_only_while_they_teach_and_parents_once(tmp_path, texts):
    shop = workshop(tmp_path, texts, [])
    source = shop.run(arm("source", keep=(4,)), 1)
    taught = arm(
        "taught",
        config=LARGE,
        parent="source",
        parent_step=4,
        growth=GrowthPlan(target=LARGE),
        moments="scale",
        teacher="source",
        teacher_step=4,
        inherit_steps=3,
    )
    found = shop.run(taught, 1)
    steps = 4 * 2 * training_flops(LARGE, 4, 6)
    assert found.points[-1].flops == steps + 3 * 2 * forward_flops(SMALL, 4, 6).total
    assert found.charged == (source.points[-1].flops, source.points[-1].seconds)


def test_a_run_needs_its_parent(tmp_path, texts):
    with pytest.raises(ValueError, match="pad comes of source, which has to be run before"):
        workshop(tmp_path, texts, []).run(arm("pad", parent="source", parent_step=4), 1)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, texts):
    shop = workshop(tmp_path, texts, [])
    with pytest.raises(ValueError, match="wild: loss is nan"):
        shop.run(arm("wild", rate=1e30), 1)
    assert not list(tmp_path.glob("*.json"))


def test_the_control_has_the_operations_of_the_grown_run():
    budget, shape = Budget(), Shape()
    _, control = source_arms(budget, 1e-3, shape)
    grown = grown_arms(budget, 1e-3)[0]
    spent = control.steps * training_flops(SMALL, *shape.lengths)
    wanted = grown.steps * training_flops(LARGE, *shape.lengths)
    assert 1.0 <= spent / wanted < 1.02
    assert control.steps % shape.eval_every == 0
    assert small_text_arms(budget, 1e-3, control)[1].teacher_step in control.keep


def test_a_mixture_begins_with_what_the_dense_model_computes(tmp_path, texts):
    shop = workshop(tmp_path, texts, [])
    source = shop.run(arm("source", keep=(4,)), 1)
    upcycled, scratch = sparse_arms(replace(QUICK, source_steps=4), 1e-3)
    first = shop.run(upcycled, 1).points[0].loss
    assert first == pytest.approx(source.points[-1].loss, abs=1e-5)
    assert shop.run(scratch, 1).charged == (0, 0)


def test_aki_has_a_layer_above_to_take_from():
    source, pad, aki = wide_arms(Budget(), 1e-3)
    assert source.config.num_encoder_layers == pad.config.num_encoder_layers == 2
    assert aki.growth.width == "aki"


def test_a_benchmark_needs_a_seed(tmp_path):
    with pytest.raises(ValueError, match="no seed"):
        bench_inheritance(tmp_path, tmp_path, [], QUICK, TINY, print)


@pytest.mark.parametrize("pair", ["small", "large"])
def test_the_command_runs_and_resumes(tmp_path, pair):
    for name in ("train", "valid"):
        (tmp_path / name).mkdir()
        lines = [f"Line {i} of the {name} text, <n>{i * i} words.\n" for i in range(400)]
        (tmp_path / name / "a.txt").write_text("".join(lines), encoding="utf-8")
    words = ["bench-inheritance", str(tmp_path), str(tmp_path / "work"), "--quick"]
    words += ["--out", str(tmp_path / "out"), "--seeds", "1", "--pair", pair]
    threads = torch.get_num_threads()
    try:
        first = CliRunner().invoke(build_app("bench-inheritance"), words)
        assert first.exit_code == 0, first.output
        again = CliRunner().invoke(build_app("bench-inheritance"), words)
    finally:
        torch.set_num_threads(threads)
    result = json.loads(first.stdout.splitlines()[-1])
    assert json.loads(again.stdout.splitlines()[-1]) == result
    assert "steps, " in first.stderr
    assert "steps, " not in again.stderr  # nothing was trained again
    assert len(result["goals"]) == (6 if pair == "small" else 3)
    name = "inheritance" if pair == "small" else "pair"
    assert result == json.loads((tmp_path / "out" / f"{name}.json").read_text())
    table = (tmp_path / "out" / f"{name}.md").read_text()
    assert all(f"| {goal['wanted']} | {goal['measured']} |" in table for goal in result["goals"])
    assert (tmp_path / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
