from dataclasses import replace

import pytest
import torch

from engine.errors import ConfigError
from tests.growth_cases import SMALL, build, gradients, random_model
from training.two_stage import draw_part, submodel, submodel_sizes

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
