from dataclasses import replace

import pytest
import torch

from engine.checkpoint import load_model
from engine.convert import convert, inspect
from engine.errors import CheckpointError, ConfigError
from engine.random_model import write_random_model
from tests.tiny import DENSE, MOE, random_ids


def test_the_same_seed_gives_the_same_model(tmp_path):
    told = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_random_model(tmp_path / name, MOE, torch.bfloat16, seed, lambda *a: told.append(a))
    one, two, other = (load_model(tmp_path / name).state_dict() for name in "abc")
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["embedding.weight"], other["embedding.weight"])
    assert told[:4] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert one["embedding.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
@torch.no_grad()
def test_the_model_computes_something(tmp_path, config):
    write_random_model(tmp_path / "m", config, torch.float32)
    ids = random_ids(2, 8)
    logits = load_model(tmp_path / "m")(ids, torch.ones_like(ids), ids, torch.ones_like(ids))
    assert torch.isfinite(logits).all()
    assert logits.std() > 0.1


def test_experts_differ_and_tokens_spread_over_them(tmp_path):
    write_random_model(tmp_path / "m", MOE, torch.float32)
    model = load_model(tmp_path / "m")
    weights = model.experts.layers["decoder-1"]["wi_0"]
    assert not torch.equal(weights[0], weights[1])
    layer = model.moe_layers()[0]
    chosen = layer.assign(layer.scores(torch.randn(64, MOE.d_model)))
    assert len(chosen.unique()) == MOE.num_experts


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_experts_are_those_of_the_same_seed(tmp_path, kind):
    config = replace(MOE, d_ff=64)
    write_random_model(tmp_path / "whole", config, torch.float32, 3)
    convert(tmp_path / "whole", tmp_path / "converted", quantization=kind)
    write_random_model(tmp_path / "m", config, torch.float32, 3, quantization=kind)
    assert inspect(tmp_path / "m")["experts"]["quantization"] == kind
    for path in (tmp_path / "m").iterdir():
        assert path.read_bytes() == (tmp_path / "converted" / path.name).read_bytes(), path.name


def test_experts_that_cannot_be_quantised_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="d_ff is 48; int4 experts need"):
        write_random_model(tmp_path / "m", MOE, torch.float32, quantization="int4")
    assert list(tmp_path.iterdir()) == []


def test_a_taken_directory_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(CheckpointError):
        write_random_model(tmp_path, DENSE, torch.float32)
    assert (tmp_path / "mine.txt").read_text() == "precious"
