import json

import pytest
import torch

from engine.checkpoint import load_model, save_model
from server.__main__ import main
from tests.training_recipes import SMALL, tiny_recipe
from training.flops import forward_flops, training_flops
from training.growth_files import RunGrowth, grow_directory
from training.growth_recipes import read_target
from training.loop import open_data, train
from training.run_compare import (
    RunCurve,
    find_run,
    make_table,
    read_curve,
    read_rows,
    sunk_flops,
)


@pytest.fixture
def runs(tmp_path):
    first = tiny_recipe(tmp_path)
    data = open_data(first)
    model = train(first, tmp_path / "one", data)
    save_model(model, tmp_path / "one" / "model", dtype=torch.float32)
    how = {"teachers": ("one",), "inherit_share": 0.5, "stop_when_passed": False}
    train(tiny_recipe(tmp_path, distill=how), tmp_path / "two", data)
    return tmp_path


def test_what_was_spent_is_added_up(runs):
    own = 6 * 4 * training_flops(SMALL, 48, 24)
    one, two = read_curve(runs / "one"), read_curve(runs / "two")
    assert one.flops == [own / 2, own]
    assert one.charged_flops == one.flops
    taught = 3 * 4 * forward_flops(SMALL, 48, 24).total
    assert sunk_flops(runs / "two") == own
    assert two.flops[-1] == own
    assert two.charged_flops[-1] == own + own + taught
    metrics = read_rows(runs / "one")
    assert one.tokens[-1] == sum(row["tokens"] for row in metrics)
    assert one.seconds[-1] == pytest.approx(sum(row["seconds"] for row in metrics))


def test_a_start_inside_a_run_is_charged(runs):
    recipe = tiny_recipe(runs, start="one/model")
    train(recipe, runs / "three", open_data(recipe))
    assert sunk_flops(runs / "three") == read_curve(runs / "one").flops[-1]


def test_what_grew_is_charged_once_though_it_also_teaches(runs):
    target = runs / "target.toml"
    target.write_text("[target]\nd_model = 24\n")
    one = read_curve(runs / "one").flops[-1]
    model, state = runs / "one" / "model", RunGrowth(runs / "one", runs / "five", "scale")
    grow_directory(model, read_target(target), runs / "big")
    grow_directory(runs / "big", read_target(target), runs / "bigger")
    grow_directory(model, read_target(target), runs / "big_state", run=state)
    taught = {"teachers": ("one",), "stop_when_passed": False}
    for name, start, how in [("three", "big", None), ("four", "bigger", taught)]:
        config = load_model(runs / start).config
        recipe = tiny_recipe(runs, model=config, start=start, distill=how, steps=1)
        train(recipe, runs / name, open_data(recipe))
        assert sunk_flops(runs / name) == one
    assert sunk_flops(runs / "five") == one  # of which only the state is there
    assert find_run(runs / "big_state") == (runs / "one").resolve()
    (runs / "big" / "growth.json").write_text('{"steps": []}')
    assert sunk_flops(runs / "three") == 0


def test_what_is_gone_or_was_moved_is_told(runs, caplog):
    target = runs / "target.toml"
    target.write_text("[target]\nd_model = 24\n")
    grow_directory(runs / "one" / "model", read_target(target), runs / "big")
    recipe = tiny_recipe(runs, model=load_model(runs / "big").config, start="big", steps=1)
    train(recipe, runs / "three", open_data(recipe))
    assert sunk_flops(runs / "three") > 0
    assert not caplog.messages
    (runs / "big").rename(runs / "moved")
    assert sunk_flops(runs / "three") == 0
    (told,) = caplog.messages
    assert f"{runs / 'big'} cost is not charged" in told
    (runs / "moved").rename(runs / "big")
    (runs / "one").rename(runs / "other")
    assert sunk_flops(runs / "three") == 0
    assert len(caplog.messages) == 2
    (runs / "plain").mkdir()  # a model that was never trained here
    facts = json.loads((runs / "three" / "recipe.json").read_text())
    facts["train"]["start"] = "plain"
    (runs / "three" / "recipe.json").write_text(json.dumps(facts))
    assert sunk_flops(runs / "three") == 0
    assert len(caplog.messages) == 2


def test_a_model_that_grew_from_itself_ends(runs):
    (runs / "odd").mkdir()
    record = {"steps": [{"receipt": {"source": "."}}]}
    (runs / "odd" / "growth.json").write_text(json.dumps(record))
    assert find_run(runs / "odd") is None


@pytest.mark.parametrize(
    "line", [b"garbage", b"[3]", b'{"a": 1}', b'{"step": 1, "flops": "x"}', b"\xff", b"3"]
)
def test_a_damaged_line_is_named(runs, line):
    path = runs / "one" / "metrics.jsonl"
    lines = path.read_bytes().splitlines()
    path.write_bytes(b"\n".join([lines[0], line, *lines[2:]]) + b"\n")
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: is no line of metrics"):
        read_curve(runs / "two")  # whose teacher it is
    path.write_bytes(lines[0] + b"\n" + line)  # what a killed run leaves
    assert len(read_rows(runs / "one")) == 1


@pytest.mark.parametrize("text", ["[1]", "{}", "{", '{"train": [], "distill": 3}'])
def test_a_damaged_record_is_named(runs, text):
    (runs / "one" / "recipe.json").write_text(text)
    with pytest.raises(ValueError, match=r"recipe.json: is damaged, so what the run cost"):
        read_curve(runs / "one")


def test_runs_that_name_each_other_end(runs):
    record = runs / "one" / "recipe.json"
    facts = json.loads(record.read_text())
    record.write_text(json.dumps(facts | {"distill": {"teachers": ["two", "one"]}}))
    assert sunk_flops(runs / "two") == read_curve(runs / "one").flops[-1]


def test_the_table_tells_when_the_first_runs_loss_is_reached():
    first = RunCurve("a", 2, 0.0, [1, 2], [1.0, 2.0], [1e3, 2e3], [1e3, 2e3], [3.0, 2.0])
    second = RunCurve("b", 2, 0.0, [1, 2], [1.0, 2.0], [1e3, 2e3], [4e3, 5e3], [1.9, 1.8])
    third = RunCurve("c", 2, 0.0, [1, 2], [1.0, 2.0], [1e3, 2e3], [1e3, 2e3], [3.0, 2.5])
    lines = make_table([first, second, third])
    assert lines[0].endswith("charged to 2.000")
    assert [line.split()[-1] for line in lines[1:]] == ["2.00e+03", "4.00e+03", "-"]
    assert lines[2].split()[:3] == ["b", "2", "2"]


def test_the_command_draws_and_prints(runs, capsys):
    plot = runs / "runs.png"
    with pytest.raises(SystemExit) as caught:
        main(["compare-runs", str(runs / "one"), str(runs / "two"), "--plot", str(plot)])
    assert caught.value.code in (0, None)
    out = capsys.readouterr().out.splitlines()
    assert out[1].startswith(str(runs / "one"))
    assert out[-1] == str(plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        main(["compare-runs", str(runs / "two"), "--plot", str(plot), "--json"])
    (found,) = json.loads(capsys.readouterr().out)
    assert found["losses"] == read_curve(runs / "two").losses


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist; name the folder of a run"):
        read_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="is empty; train the run first"):
        read_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "tokens": 3}\n')
    with pytest.raises(ValueError, match="has no evaluation yet"):
        read_curve(tmp_path)
