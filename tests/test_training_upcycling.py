"""Dense to experts: clones compute what the dense model did, and options set them apart."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import ConfigError
from tests.growth_cases import SMALL, build, difference, random_model
from training.growth import GrowthPlan, grow, prepare_growth
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
