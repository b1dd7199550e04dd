from dataclasses import replace

import pytest
import torch

from engine.checkpoint import load_model
from engine.errors import ConfigError
from server.__main__ import main
from tests.growth_cases import SMALL, build, gradients, random_model
from tests.training_recipes import SMALL as TINY
from tests.training_recipes import (
    Killed,
    kill_after,
    recipe_text,
    rows,
    tiny_recipe,
    write_texts,
)
from training.flops import forward_flops, training_flops
from training.loop import open_data, train
from training.two_stage import draw_part, part_of_step, step_flops, submodel, submodel_sizes

DEEP = replace(SMALL, num_encoder_layers=4, num_decoder_layers=3, num_experts=2, router="default")


def test_submodels_grow_by_steps_to_the_whole():
    assert submodel_sizes(12, 3) == [3, 6, 9, 12]
    assert submodel_sizes(7, 3) == [3, 6, 7]
    for step in (0, 13):
        with pytest.raises(ConfigError, match="allowed: 1 to 12"):
            submodel_sizes(12, step)


def test_draws_are_spread_and_repeatable():
    drawn = [draw_part(1, step, 3) for step in range(300)]
    assert drawn == [draw_part(1, step, 3) for step in range(300)]
    assert all(70 < drawn.count(part) < 130 for part in (1, 2, 3))


def test_a_submodel_is_the_lower_part_and_trains_its_top():
    model = random_model(DEEP)
    took = {name: p.requires_grad for name, p in model.named_parameters()}
    with submodel(model, 2, 1) as lower:
        assert (len(lower.encoder.layers), len(lower.decoder.layers)) == (2, 2)
        moved = set(gradients(lower))
    inside = ("encoder.layers.1.", "decoder.layers.1.", "experts.layers.encoder-1.")
    inside += ("experts.layers.decoder-1.", "encoder.norm.", "decoder.norm.", "lm_head.")
    assert moved
    assert all(name.startswith(inside) for name in moved)
    assert {name.split(".")[0] for name in moved} == {"encoder", "decoder", "experts", "lm_head"}
    assert (len(model.encoder.layers), len(model.decoder.layers)) == (4, 3)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == took


def test_a_submodel_computes_what_a_model_of_that_depth_does():
    model = random_model(DEEP)
    config = replace(DEEP, num_encoder_layers=2, num_decoder_layers=2)
    short = build(config, {k: v for k, v in model.state_dict().items() if k in names(config)})
    ids = torch.arange(8).unsqueeze(0)
    ones = torch.ones_like(ids)
    with torch.no_grad(), submodel(model, 1, 2) as lower:
        assert torch.equal(lower(ids, ones, ids, ones), short(ids, ones, ids, ones))


def names(config):
    return random_model(config).state_dict().keys()


def test_a_failing_step_leaves_the_model_whole():
    model = random_model(DEEP)
    with pytest.raises(RuntimeError, match="step"), submodel(model, 1, 1):
        raise RuntimeError("step")
    assert len(model.encoder.layers) == 4
    assert model.embedding.weight.requires_grad


STAGES = replace(TINY, num_encoder_layers=3, num_decoder_layers=2)


def two_stages(folder, **settings):
    how = {"steps": 8, "submodel_until": 0.5, "submodel_layers": 1} | settings
    return tiny_recipe(folder, model=STAGES, **how)


def test_a_recipe_trains_sub_models_first_and_then_the_whole(tmp_path):
    recipe = two_stages(tmp_path, checkpointing=True)
    train(recipe, tmp_path / "run", open_data(recipe))
    found = rows(tmp_path / "run")
    parts = [row.get("submodel") for row in found]
    assert parts == [part_of_step(recipe, step) for step in range(8)]
    assert all(part in (1, 2, 3) for part in parts[:4])
    assert parts[4:] == [None] * 4
    whole = 4 * training_flops(STAGES, 48, 24)
    assert [row["flops"] for row in found[4:]] == [whole] * 4
    for row in found[:4]:
        assert row["flops"] == 4 * step_flops(STAGES, row["submodel"], 1, 48, 24) < whole


def test_what_a_sub_model_does_not_train_stays(tmp_path):
    recipe = two_stages(tmp_path, steps=1, submodel_until=1.0, weight_decay=0.0, seed=3)
    part = part_of_step(recipe, 0)
    assert part is not None
    data = open_data(recipe)
    still = replace(recipe, train=replace(recipe.train, learning_rate=1e-30))
    before = dict(train(still, tmp_path / "still", data).named_parameters())
    after = dict(train(recipe, tmp_path / "run", data).named_parameters())
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert not any(name.startswith("embedding") for name in moved)
    layers = {name.split(".")[2] for name in moved if name.startswith("encoder.layers.")}
    assert layers == {str(part - 1)}


def test_the_first_stage_resumes(tmp_path):
    recipe = two_stages(tmp_path)
    data = open_data(recipe)
    train(recipe, tmp_path / "whole", data)
    with pytest.raises(Killed):
        train(recipe, tmp_path / "cut", data, kill_after(3))
    train(recipe, tmp_path / "cut", data)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


def test_operations_of_a_sub_model_have_no_backward_pass_below_what_it_trains():
    all_layers = step_flops(STAGES, None, 1, 48, 24)
    assert all_layers == training_flops(STAGES, 48, 24) == step_flops(STAGES, 1, 3, 48, 24)
    lowest = replace(STAGES, num_encoder_layers=1, num_decoder_layers=1)
    assert step_flops(STAGES, 1, 1, 48, 24) == training_flops(lowest, 48, 24)
    forward = forward_flops(STAGES, 48, 24).total
    frozen = forward - forward_flops(lowest, 48, 24).total  # two encoder layers, one of the decoder
    assert step_flops(STAGES, 3, 1, 48, 24) == training_flops(STAGES, 48, 24) - 2 * frozen


def test_a_model_that_was_stacked_is_trained_in_two_stages_by_command(tmp_path):
    write_texts(tmp_path)
    (tmp_path / "grow.toml").write_text(
        '[target]\nnum_encoder_layers = 2\nnum_decoder_layers = 2\n[growth]\nrecipe = "bert2bert"\n'
    )
    (tmp_path / "small.toml").write_text(recipe_text(train={"steps": 2}))
    how = {"start": "big", "submodel_until": 0.5, "submodel_layers": 1}
    deep = {"num_encoder_layers": 2, "num_decoder_layers": 2}
    (tmp_path / "big.toml").write_text(recipe_text(model=deep, train=how))
    run, big = str(tmp_path / "run"), str(tmp_path / "big")
    main_ok(["train", str(tmp_path / "small.toml"), run])
    main_ok(["grow", f"{run}/model", str(tmp_path / "grow.toml"), "--out", big])
    main_ok(["train", str(tmp_path / "big.toml"), str(tmp_path / "next")])
    assert [("submodel" in row) for row in rows(tmp_path / "next")] == [True, True, False, False]
    assert load_model(tmp_path / "next" / "model").config.num_encoder_layers == 2


def main_ok(words):
    with pytest.raises(SystemExit) as exit_info:
        main(words)
    assert exit_info.value.code == 0


def test_sub_models_larger_than_the_model_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="submodel_layers is 4; the model has 3"):
        two_stages(tmp_path, submodel_layers=4)
    two_stages(tmp_path, submodel_layers=4, submodel_until=0.0)
