"""Dense to experts: clones compute what the dense model did, and options set them apart."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.checkpoint import load_model, save_model
from engine.errors import ConfigError
from tests.growth_cases import ROWS, SMALL, build, difference, gradients, grown, random_model
from tests.tiny import LLAMA, random_ids
from tests.training_recipes import SMALL as TINY
from tests.training_recipes import recipe_text, rows, tiny_recipe, write_texts
from training.growth import GrowthPlan, grow, prepare_growth
from training.growth_files import grow_directory
from training.growth_recipes import read_target
from training.loop import open_data, train
from training.recipe import read_recipe
from training.upcycling import Upcycling


def upcycled(model, router="cpm_2", num_experts=4, experts=None, **sizes):
    target = replace(model.config, num_experts=num_experts, router=router, **sizes)
    plan = GrowthPlan(target=target, experts=experts or Upcycling())
    growth = prepare_growth(model.config, plan)
    return growth, build(growth.target, grow(model.state_dict(), growth))


@given(
    st.sampled_from(["cpm_2", "default"]),
    st.integers(2, 16),
    st.booleans(),
    st.sampled_from(["orthogonal", "normal"]),
    st.booleans(),
)
@settings(max_examples=20)
def test_clones_without_a_gate_are_exact(router, num_experts, gated, start, grows):
    model = random_model(replace(SMALL, gated=gated))
    sizes = {"d_model": 19, "d_ff": 14, "num_encoder_layers": 3} if grows else {}
    options = Upcycling(router_start=start)
    growth, sparse = upcycled(model, router, num_experts, options, **sizes)
    assert growth.is_exact
    assert difference(model, sparse) <= 1e-5
    assert not growth.warnings()


@given(
    st.sampled_from(["softmax", "sigmoid"]),
    st.integers(2, 9),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from(["all", "every_second", "upper_half", "encoder", "decoder"]),
    st.booleans(),
)
@settings(max_examples=25)
def test_clones_with_gates_that_sum_to_1_are_exact(
    router, num_experts, top_k, gated, layers, grows
):
    model = random_model(replace(SMALL, gated=gated))
    sizes = {"d_model": 19, "d_ff": 14, "num_encoder_layers": 3} if grows else {}
    sizes |= {"num_experts_per_token": min(top_k, num_experts), "normalize_gates": True}
    options = Upcycling(layers=layers, router_start="normal")
    growth, sparse = upcycled(model, router, num_experts, options, **sizes)
    assert growth.is_exact
    assert not growth.warnings()
    assert difference(model, sparse) <= 1e-5


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ("every_second", ["encoder-1", "decoder-1", "decoder-3"]),
        ("upper_half", ["encoder-2", "decoder-2", "decoder-3"]),
        ("encoder", ["encoder-0", "encoder-1", "encoder-2"]),
        ("decoder", ["decoder-0", "decoder-1", "decoder-2", "decoder-3"]),
    ],
)
def test_layers_that_are_not_chosen_stay_dense(layers, chosen):
    model = random_model(replace(SMALL, num_encoder_layers=3, num_decoder_layers=4))
    growth, sparse = upcycled(model, "softmax", 2, Upcycling(layers=layers))
    assert growth.target.moe_layers() == [layer.name for layer in sparse.moe_layers()] == chosen
    old, new = model.state_dict(), sparse.state_dict()
    for name in old:
        if ".feed_forward." in name:
            stack, _, index, *_ = name.split(".")
            assert (name in new) == (f"{stack}-{index}" not in chosen)
    by_name, same = upcycled(model, "softmax", 2, dense_layers=growth.target.dense_layers)
    assert by_name.target == growth.target
    assert difference(sparse, same) == 0.0
    with pytest.raises(ConfigError, match="dense_layers are given too"):
        upcycled(model, "softmax", 2, Upcycling(layers=layers), dense_layers=("encoder-0",))


def test_a_decoder_only_model_becomes_a_mixture_that_computes_the_same():
    model = random_model(LLAMA)
    how = {"num_experts_per_token": 2, "normalize_gates": True}
    growth, sparse = upcycled(model, "softmax", 4, Upcycling(layers="every_second"), **how)
    assert growth.target.moe_layers() == ["decoder-1"]
    ids = random_ids(2, 8)
    with torch.no_grad():
        before, after = (m(ids, torch.ones_like(ids), ids, ROWS) for m in (model, sparse))
    assert growth.is_exact
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    for change, message in [
        ({"d_model": 40}, "d_model grows in models of the T5 family only"),
        ({"num_decoder_layers": 4}, "layers can be added to models of the T5 family only"),
    ]:
        with pytest.raises(ConfigError, match=message):
            grown(model, **change)


def test_gates_that_do_not_sum_to_1_are_made_up_for_at_first():
    model = random_model(SMALL)
    for router, factor in (("softmax", 8 / 2), ("sigmoid", 1.0)):
        growth, sparse = upcycled(model, router, 8, num_experts_per_token=2)
        assert not growth.is_exact
        assert any("set normalize_gates" in warning for warning in growth.warnings())
        assert difference(model, sparse) < 0.1
        old = model.state_dict()["encoder.layers.0.feed_forward.wo.weight"]
        found = sparse.state_dict()["experts.layers.encoder-0.wo"][5]
        torch.testing.assert_close(found, factor * old)


def test_a_mixture_of_gated_experts_grows_on_exactly():
    how = {"num_experts_per_token": 2, "normalize_gates": True}
    _, sparse = upcycled(random_model(SMALL), "softmax", 4, Upcycling(noise=0.5), **how)
    growth, wide = grown(sparse, d_model=20, d_ff=16, num_heads=5, num_decoder_layers=3)
    assert growth.is_exact
    assert difference(sparse, wide) <= 1e-5
    _, half = upcycled(random_model(SMALL), "softmax", 4, Upcycling(layers="decoder"))
    with pytest.raises(ConfigError, match="layers can be added .* whose layers are all alike"):
        grown(half, num_encoder_layers=3)
    with pytest.raises(ConfigError, match="dense_layers is .*it cannot grow"):
        grown(half, dense_layers=())


def test_routers_of_clones_learn():
    how = {"num_experts_per_token": 2, "normalize_gates": True}
    _, sparse = upcycled(random_model(SMALL), "softmax", 4, Upcycling(noise=0.1), **how)
    moved = gradients(sparse)
    assert float(moved["encoder.layers.0.moe.router.weight"].abs().max()) > 0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"router": "sparsemixer"}, "choose softmax or sigmoid"),
        ({"shared_d_ff": 4}, "leave expert_d_ff and shared_d_ff out"),
        ({"expert_d_ff": 4}, "leave expert_d_ff and shared_d_ff out"),
        ({"expert_bias": True}, "expert_bias must be False"),
        ({"dense_layers": ("encoder-0", "encoder-1", "decoder-0", "decoder-1")}, "no layer has"),
    ],
)
def test_experts_that_are_no_clones_are_refused(sizes, message):
    with pytest.raises(ConfigError, match=message):
        upcycled(random_model(SMALL), **{"router": "softmax"} | sizes)
    with pytest.raises(ConfigError, match="experts of router cpm_2 have RMS norms"):
        upcycled(random_model(replace(SMALL, norm="layer")))


def test_a_dense_run_is_upcycled_to_two_experts_per_token_and_trained_on(tmp_path):
    write_texts(tmp_path)
    save_model(random_model(TINY), tmp_path / "dense")
    (tmp_path / "moe.toml").write_text(
        '[target]\nnum_experts = 4\nrouter = "softmax"\nnum_experts_per_token = 2\n'
        'normalize_gates = true\n[experts]\nlayers = "decoder"\n'
    )
    receipt = grow_directory(tmp_path / "dense", read_target(tmp_path / "moe.toml"), tmp_path / "m")
    assert receipt.step.is_exact
    assert receipt.step.receipt["max_logit_difference"] <= 1e-5
    config = load_model(tmp_path / "m").config
    assert config.moe_layers() == ["decoder-0"]
    how = {"balance_loss": 0.01, "router_z_loss": 1e-3, "checkpointing": True, "expert_drop": 0.1}
    recipe = tiny_recipe(tmp_path, model=config, start="m", **how)
    trained = train(recipe, tmp_path / "run", open_data(recipe))
    first = load_model(tmp_path / "m").state_dict()["decoder.layers.0.moe.router.weight"]
    assert not torch.equal(trained.state_dict()["decoder.layers.0.moe.router.weight"], first)
    assert rows(tmp_path / "run")[-1]["valid_loss"] < rows(tmp_path / "run")[2]["valid_loss"]
    with pytest.raises(ConfigError, match="router_noise is for routers that take one expert"):
        replace(recipe, train=replace(recipe.train, router_noise=0.1))
    model = {"num_experts": 4, "router": "softmax", "num_experts_per_token": 2}
    (tmp_path / "recipe.toml").write_text(
        recipe_text(model=model | {"dense_layers": ["encoder-0"]})
    )
    assert read_recipe(tmp_path / "recipe.toml").model.moe_layers() == ["decoder-0"]


def test_centroids_start_as_cpm_2_or_small_and_normal():
    model = random_model(SMALL)
    _, sparse = upcycled(model)
    centroids_ED = sparse.encoder.blocks()[0].moe.centroids
    assert torch.allclose(centroids_ED @ centroids_ED.T, 1e-4 * torch.eye(4), atol=1e-8)
    _, sparse = upcycled(model, "default", 64, Upcycling(router_start="normal"))
    assert abs(float(sparse.encoder.blocks()[0].moe.centroids.std()) - 0.02) < 0.002
    first, second = (block.moe.centroids for block in sparse.decoder.blocks())
    assert not torch.equal(first, second)


def test_a_gate_of_one_half_is_made_up_for_and_not_called_exact():
    model = random_model(SMALL)
    growth, sparse = upcycled(model, "base_layer")
    assert not growth.is_exact
    assert any("gates its experts" in warning for warning in growth.warnings())
    assert difference(model, sparse) < 0.1
    old = model.state_dict()["encoder.layers.0.feed_forward.wo.weight"]
    assert torch.equal(sparse.state_dict()["experts.layers.encoder-0.wo"][2], 2 * old)


def test_dropped_channels_are_the_same_in_all_matrices_of_an_expert():
    model = random_model(replace(SMALL, d_ff=40))
    growth, sparse = upcycled(model, experts=Upcycling(drop=0.5))
    assert not growth.is_exact
    old, new = model.state_dict(), sparse.state_dict()
    kept_of = []
    for expert in range(4):
        kept = []
        for key in ("wi_0", "wi_1", "wo"):
            before = old[f"decoder.layers.1.feed_forward.{key}.weight"]
            after = new[f"experts.layers.decoder-1.{key}"][expert]
            same = before == after
            kept.append(same.all(0) if key == "wo" else same.all(1))
            ratio = float(after.std() / before.std())
            assert 0.8 < ratio < 1.2
        assert int(kept[0].sum()) == 20
        assert all(torch.equal(kept[0], other) for other in kept)
        kept_of.append(tuple(kept[0].tolist()))
    assert len(set(kept_of)) == 4


def test_noise_is_small_and_of_its_own_for_each_expert():
    model = random_model(SMALL)
    growth, sparse = upcycled(model, experts=Upcycling(noise=0.01))
    assert not growth.is_exact
    before = model.state_dict()["encoder.layers.0.feed_forward.wi_0.weight"]
    after_EFD = sparse.state_dict()["experts.layers.encoder-0.wi_0"]
    shares = (after_EFD - before).std((1, 2)) / before.std()
    assert bool(((shares > 0.005) & (shares < 0.02)).all())
    assert not torch.equal(after_EFD[0], after_EFD[1])
    assert 0 < difference(model, sparse) < 0.5


@pytest.mark.parametrize(
    ("how", "message"),
    [({"drop": 1.5}, "drop is 1.5; allowed: 0 to 1"), ({"noise": -0.1}, "noise is -0.1")],
)
def test_impossible_options_are_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        Upcycling(**how)
