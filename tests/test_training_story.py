import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.checkpoint import load_model
from engine.errors import ConfigError
from server.__main__ import main
from tests.training_recipes import Killed, recipe_text, rows, write_texts
from training.lifelong import read_plan
from training.recipe import read_recipe
from training.run_compare import sunk_flops
from training.stages import grow_once
from training.story import describe_stage, make_vocabulary, read_story, run_story

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
TRAIN = {"eval_batches": 1}
STORY = """
[[stages]]
name = "small"
recipe = "small.toml"
[[stages]]
name = "moe"
recipe = "moe.toml"
grow = "to_moe.toml"
"""


@pytest.fixture
def folder(tmp_path):
    write_texts(tmp_path, ("a",))
    (tmp_path / "small.toml").write_text(recipe_text(train=TRAIN))
    (tmp_path / "moe.toml").write_text(recipe_text(model={"num_experts": 2}, train=TRAIN))
    (tmp_path / "to_moe.toml").write_text("[target]\nnum_experts = 2\n")
    (tmp_path / "story.toml").write_text(STORY)
    return tmp_path


def test_each_stage_begins_where_the_last_one_ended(folder):
    small, moe = run_story(read_story(folder), folder / "out", lambda *_: None)
    assert moe["loss_before"]["a"] == pytest.approx(small["loss_after"]["a"], abs=1e-3)
    assert moe["parameters"] > small["parameters"]
    assert any("upcycle" in line for line in moe["growth"])
    model = load_model(folder / "out" / "moe" / "model", torch.float32)
    assert model.config.num_experts == 2
    assert describe_stage(moe)[-1].startswith("  validation loss: a ")


def test_what_the_stages_before_had_computed_is_charged(folder):
    small, _ = run_story(read_story(folder), folder / "out", lambda *_: None)
    assert sunk_flops(folder / "out" / "small") == 0
    assert sunk_flops(folder / "out" / "moe") == small["flops"]


def test_a_killed_story_goes_on(folder):
    story = read_story(folder)
    whole = run_story(story, folder / "whole", lambda *_: None)

    def begin(name, _steps):
        def kill(row):
            if name == "moe" and row["step"] == 3:
                raise Killed

        return kill

    with pytest.raises(Killed):
        run_story(story, folder / "cut", begin)
    seen = []
    resumed = run_story(story, folder / "cut", lambda name, _: seen.append(name))
    assert seen == ["moe"]
    assert rows(folder / "cut" / "moe") == rows(folder / "whole" / "moe")
    kept = ("growth", "loss_before", "loss_after", "parameters", "tokens", "flops")
    assert [resumed[1][key] for key in kept] == [whole[1][key] for key in kept]


def test_growth_without_a_receipt_is_done_again(folder):
    story = read_story(folder)
    one = replace(story, stages=story.stages[:1])
    run_story(one, folder / "out", lambda *_: None)
    out = folder / "out" / "moe"
    (out / "start").mkdir(parents=True)
    lines = grow_once(folder / "out" / "small" / "model", folder / "to_moe.toml", out)
    assert lines == grow_once(folder / "nowhere", folder / "to_moe.toml", out)
    assert load_model(out / "start").config.num_experts == 2


def test_the_command_tells_what_each_stage_did(folder, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["story", str(folder), "--out", str(folder / "out")])
    out, err = capsys.readouterr()
    assert caught.value.code in (0, None), err
    assert out.splitlines()[-1] == str(folder / "out" / "moe" / "model")
    facts = json.loads(out.splitlines()[-2])
    assert [stage["name"] for stage in facts] == ["small", "moe"]
    assert "moe: " in err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first stage begins anew"),
        ('[[stages]]\nname = "a"', r"\[stages\] lacks recipe"),
        (STORY.replace('grow = "to_moe.toml"', ""), "all others need grow"),
        ("[other]\n" + STORY, "unknown tables other"),
        ("[vocabulary]\nsize = 3\n" + STORY, "needs folder, size and texts"),
        ("[", "cannot be read as TOML"),
    ],
)
def test_mistakes_are_named(folder, text, message):
    (folder / "story.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_story(folder)


def test_a_vocabulary_that_is_there_is_kept(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "vocab.txt").write_text("kept")
    make_vocabulary(tmp_path, {"folder": "v", "size": 9, "texts": ["none.txt"]})
    assert (tmp_path / "v" / "vocab.txt").read_text() == "kept"


def test_the_recipes_that_come_along_are_valid():
    story = read_story(RECIPES / "story")
    recipes = [read_recipe(RECIPES / "story" / stage.recipe) for stage in story.stages]
    assert [recipe.model.num_experts for recipe in recipes] == [0, 0, 4]
    assert {source.group for source in recipes[2].data.sources} == {"zh", "en"}
    assert len(read_plan(RECIPES / "lifelong.toml").domains) == 4
