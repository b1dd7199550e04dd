"""Moments through growth: they are those that the grown model would have gathered itself."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.transformer import Transformer
from tests.growth_cases import ROWS, SMALL, build, random_model
from tests.tiny import LLAMA, random_ids
from training.growth import GrowthPlan, grow, prepare_growth
from training.growth_optimizer import RunState, grow_moments, parameter_order, read_run, write_run
from training.optimizers import build_optimizer
from training.recipe import TrainRecipe
from training.state import STATE_FILE, load_state, read_state, save_state
from training.state_shards import save_shards

WIDER = {"d_model": 24, "d_ff": 20, "d_kv": 8, "num_heads": 6}
EXPERTS = replace(SMALL, num_experts=3)


def optimizer_of(model: Transformer, kind: str = "adamw") -> torch.optim.Optimizer:
    return build_optimizer(model, TrainRecipe(steps=1, optimizer=kind))


def run_still(model: Transformer, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    """Gather moments at a rate of 0, so that the weights stay what they are."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for step in range(steps):
        ids = random_ids(2, 8, step).remainder(SMALL.vocab_size)
        optimizer.zero_grad()
        F.cross_entropy(model(ids, ROWS, ids, ROWS).flatten(0, 1), ids.flatten()).backward()
        optimizer.step()


def grown_run(tmp_path, config: ModelConfig, kind: str, how: str, **plan):
    """A run, grown; and another that began grown and saw the same."""
    sizes = {key: plan.pop(key) for key in list(plan) if key in ModelConfig.__dataclass_fields__}
    growth = prepare_growth(config, GrowthPlan(target=replace(config, **sizes), **plan))
    model = random_model(config)
    optimizer = optimizer_of(model, kind)
    run_still(model, optimizer)
    save_state(tmp_path, 3, model, optimizer)
    run = read_run(tmp_path, config)
    assert run.weights.keys() == model.state_dict().keys()
    moments = grow_moments(run.moments, run.weights, growth, how)
    wide = build(growth.target, grow(run.weights, growth))
    own = optimizer_of(wide, kind)
    run_still(wide, own)
    return growth, moments, own, parameter_order(growth.target, kind)


def own_moments(optimizer: torch.optim.Optimizer, names: list[str], key: str) -> dict:
    state = optimizer.state_dict()["state"]
    return {names[i]: values[key] for i, values in state.items() if key in values}


@pytest.mark.parametrize("config", [SMALL, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize(
    ("width", "kind"), [("isometric", "adamw"), ("fpi", "adamw"), ("fpi", "muon")]
)
def test_scaled_moments_are_those_of_a_run_that_began_grown(tmp_path, config, width, kind):
    _, moments, own, names = grown_run(tmp_path, config, kind, "scale", **WIDER, width=width)
    assert ("momentum_buffer" in moments) == (kind == "muon")
    for key in moments:
        expected = own_moments(own, names, key)
        assert moments[key].keys() == expected.keys()
        for name, value in expected.items():
            bound = 1e-3 * float(value.abs().max()) + 1e-12
            assert float((moments[key][name] - value).abs().max()) <= bound, (key, name)


@pytest.mark.parametrize("kind", ["adafactor", "adafactor_hf"])
@pytest.mark.parametrize("config", [SMALL, EXPERTS], ids=["dense", "experts"])
def test_factors_of_adafactor_are_scaled_as_well(tmp_path, config, kind):
    # d_kv stays: queries and keys would grow by other factors, and columns are means over both
    wider = WIDER | {"d_kv": SMALL.d_kv, "width": "fpi"}
    _, moments, own, names = grown_run(tmp_path, config, kind, "scale", **wider)
    keys = {
        "adafactor": ("row_var", "col_var", "variance"),
        "adafactor_hf": ("exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq"),
    }
    for key in keys[kind]:
        expected = own_moments(own, names, key)
        assert moments[key].keys() == expected.keys()
        for name, value in expected.items():
            assert moments[key][name].shape == value.shape
            bound = 2e-3 * float(value.abs().max()) + 1e-12
            assert float((moments[key][name] - value).abs().max()) <= bound, (key, name)


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adafactor_hf", "muon"])
def test_padding_carries_old_moments_and_gives_new_ones_the_mean(tmp_path, kind):
    growth, moments, own, names = grown_run(tmp_path, SMALL, kind, "carry", d_model=20, d_ff=15)
    old = read_run(tmp_path, SMALL).moments
    name = "encoder.layers.0.feed_forward.wi_0.weight"
    if kind in ("adamw", "muon"):
        key = "exp_avg" if kind == "adamw" else "momentum_buffer"
        first = moments[key][name]
        assert torch.equal(first[:10, :12], old[key][name])
        assert not first[10:].any()
        assert not first[:, 12:].any()
    if kind == "adamw":
        second = moments["exp_avg_sq"][name]
        assert torch.equal(second[:10, :12], old["exp_avg_sq"][name])
        assert torch.allclose(second[12, 14], old["exp_avg_sq"][name].mean())
    if kind.startswith("adafactor"):
        key = "row_var" if kind == "adafactor" else "exp_avg_sq_row"
        rows = moments[key][name]
        assert torch.allclose(rows[:10], old[key][name], rtol=1e-5)
        assert torch.allclose(rows[10:], old[key][name].mean(), rtol=1e-5)


def test_layers_that_are_the_identity_begin_without_moments(tmp_path):
    _, moments, own, names = grown_run(tmp_path, SMALL, "adamw", "carry", num_encoder_layers=3)
    missing = set(own_moments(own, names, "exp_avg")) - moments["exp_avg"].keys()
    assert missing == {name for name in names if name.startswith("encoder.layers.2.")}


def test_layers_that_are_copies_have_the_moments_of_their_origin(tmp_path):
    how = {"num_encoder_layers": 4, "depth": "stack"}
    _, moments, own, names = grown_run(tmp_path, EXPERTS, "adamw", "carry", **how)
    assert moments["exp_avg"].keys() == own_moments(own, names, "exp_avg").keys()
    wo = "experts.layers.encoder-{}.wo"
    assert torch.equal(moments["exp_avg"][wo.format(3)], moments["exp_avg"][wo.format(1)])


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "adafactor_hf", "muon"])
@pytest.mark.parametrize("how", ["carry", "scale", "reset"])
def test_a_grown_run_goes_on_from_its_state(tmp_path, kind, how):
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    model = random_model(SMALL)
    optimizer = optimizer_of(model, kind)
    run_still(model, optimizer)
    save_state(old, 3, model, optimizer)
    big = replace(SMALL, d_model=20, d_ff=15, num_heads=4, num_decoder_layers=3)
    growth = prepare_growth(SMALL, GrowthPlan(target=big))
    run = read_run(old, SMALL)
    weights = grow(run.weights, growth)
    moments = grow_moments(run.moments, run.weights, growth, how)
    write_run(new, growth.target, RunState(run.optimizer, weights, moments))
    wide = Transformer(growth.target)
    resumed = optimizer_of(wide, kind)
    assert load_state(new, wide, resumed) == 0
    assert bool(resumed.state_dict()["state"]) == (how != "reset")
    run_still(wide, resumed)
    for name, value in wide.state_dict().items():
        assert torch.isfinite(value).all(), name
    with pytest.raises(CheckpointError, match="holds the state of a run"):
        write_run(new, growth.target, RunState(run.optimizer, weights, moments))


def test_moments_do_not_go_through_upcycling():
    growth = prepare_growth(SMALL, GrowthPlan(target=EXPERTS))
    with pytest.raises(ConfigError, match="moments: carry goes through width and depth"):
        grow_moments({}, {}, growth, "carry")
    assert grow_moments({}, {}, growth, "reset") == {}


def test_moments_of_other_families_begin_anew():
    growth = prepare_growth(LLAMA, GrowthPlan(target=LLAMA))
    with pytest.raises(ConfigError, match="moments: scale is for models of the T5 family"):
        grow_moments({}, {}, growth, "scale")
    assert grow_moments({}, {}, growth, "reset") == {}


def test_a_run_of_several_processes_is_read_from_its_shards(tmp_path):
    model = random_model(SMALL)
    optimizer = optimizer_of(model)
    run_still(model, optimizer)
    save_state(tmp_path, 3, model, optimizer)
    whole = read_run(tmp_path, SMALL)
    facts, tensors = read_state(tmp_path / STATE_FILE)
    (tmp_path / STATE_FILE).unlink()
    save_shards(tmp_path, facts, tensors)
    found = read_run(tmp_path, SMALL)
    assert found.moments.keys() == whole.moments.keys()
    for name, weight in whole.weights.items():
        assert torch.equal(found.weights[name], weight)


def test_a_run_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist; give the folder of a run"):
        read_run(tmp_path, SMALL)
    (tmp_path / "state.safetensors").write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be grown"):
        read_run(tmp_path, SMALL)
    model = random_model(SMALL)
    save_state(tmp_path, 1, model, optimizer_of(model))
    with pytest.raises(CheckpointError, match="holds another model than the one to grow"):
        read_run(tmp_path, replace(SMALL, d_ff=16))
