"""Growth of width and depth: what is exact is exact, and the rest says that it is not."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from engine.errors import ConfigError
from engine.model.transformer import Transformer
from tests.growth_cases import ROWS, SMALL, difference, gradients, grown, logits, random_model
from tests.tiny import random_ids
from training.growth import GrowthPlan, describe, grow_prompt, prepare_growth
from training.growth_axes import parameter_roles
from training.growth_depth import Layer, plan_layers
from training.growth_width import expand_layered

configs = st.builds(
    lambda gated, activation, tied, scaled, experts, router: replace(
        SMALL,
        gated=gated,
        activation=activation,
        tied_embeddings=tied,
        scale_logits=scaled,
        num_experts=experts,
        router=router,
    ),
    st.booleans(),
    st.sampled_from(["gelu_tanh", "relu"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0, 3]),
    st.sampled_from(["cpm_2", "base_layer", "default"]),
)
sizes = st.fixed_dictionaries(
    {
        "d_model": st.integers(12, 30),
        "d_ff": st.integers(10, 25),
        "d_kv": st.integers(4, 9),
        "num_heads": st.integers(3, 7),
        "num_encoder_layers": st.integers(2, 4),
        "num_decoder_layers": st.integers(2, 4),
    }
)


@given(configs, sizes, st.sampled_from(["pad", "isometric"]), st.booleans(), st.integers(0, 9))
@settings(max_examples=60)
def test_padding_and_isometric_copies_are_exact_for_any_size(config, big, width, uneven, seed):
    model = random_model(config, seed)
    split = "uneven" if uneven and width == "isometric" else "even"
    growth, wide = grown(model, **big, width=width, split=split)
    assert growth.is_exact
    assert difference(model, wide) <= 1e-5
    assert float(logits(model).std()) > 0.05  # nothing is equal by being nothing


@given(configs, st.integers(1, 3), sizes, st.booleans(), st.integers(0, 9))
@settings(max_examples=40)
def test_equal_copies_are_exact(config, times, big, uneven, seed):
    model = random_model(config, seed)
    big["d_model"] = times * config.d_model
    split = "uneven" if uneven else "even"
    growth, wide = grown(model, **big, width="fpi", split=split)
    assert growth.is_exact
    assert difference(model, wide) <= 1e-5


@pytest.mark.parametrize("width", ["fpi", "aki", "corner"])
def test_what_is_not_exact_says_so(width):
    model = random_model(SMALL)
    growth, wide = grown(model, d_model=17, d_ff=13, num_heads=4, width=width)
    assert not growth.is_exact
    assert difference(model, wide) > 1e-3


# --- gradients, by which moments are scaled


@pytest.mark.parametrize("experts", [0, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", ["pad", "isometric", "fpi"])
def test_gradients_grow_by_the_factors_of_the_maps(width, tied, experts):
    config = replace(
        SMALL, tied_embeddings=tied, scale_logits=True, num_experts=experts, router="base_layer"
    )
    model = random_model(config)
    big = {"d_model": 24, "d_ff": 21, "d_kv": 6, "num_heads": 5}
    growth, wide = grown(model, **big, width=width)
    before, after = gradients(model), gradients(wide)
    assert before.keys() == after.keys()
    for name in before:
        expected = expand_layered(before, name, growth.maps, "grad")
        known = ~expected.is_new
        scale = float(before[name].abs().max())
        worst = (expected.values - after[name]).abs()[known].max()
        assert float(worst) <= 1e-4 * scale + 1e-7, name


def loss(model: Transformer, step: int) -> torch.Tensor:
    ids = random_ids(2, 8, step).remainder(SMALL.vocab_size)
    return F.cross_entropy(model(ids, ROWS, ids, ROWS).flatten(0, 1), ids.flatten())


def distance_of_copies(model: Transformer) -> float:
    rows = model.encoder.blocks()[0].feed_forward.wi_0.weight
    return float((rows[:10] - rows[10:]).detach().abs().max())


@pytest.mark.parametrize(
    ("how", "differ"), [({}, False), ({"split": "uneven"}, True), ({"noise": 0.02}, True)]
)
def test_copies_part_only_with_a_tie_breaker_and_without_one_is_a_warning(how, differ):
    growth, wide = grown(random_model(SMALL), d_model=24, d_ff=20, width="fpi", **how)
    optimizer = torch.optim.AdamW(wide.parameters(), lr=1e-3)
    before = distance_of_copies(wide)
    for step in range(30):
        optimizer.zero_grad()
        loss(wide, step).backward()
        optimizer.step()
    after = distance_of_copies(wide)
    assert (after > max(1e-4, before * 1.001)) == differ
    assert any("without split or noise" in warning for warning in growth.warnings()) != differ


def test_every_weight_of_padding_learns_within_two_steps():
    _, wide = grown(
        random_model(SMALL),
        d_model=20,
        d_ff=15,
        d_kv=6,
        num_heads=4,
        num_encoder_layers=3,
    )
    optimizer = torch.optim.SGD(wide.parameters(), lr=1e-3)
    moved = {name: torch.zeros_like(p, dtype=torch.bool) for name, p in wide.named_parameters()}
    for step in range(3):
        optimizer.zero_grad()
        loss(wide, step).backward()
        optimizer.step()
        for name, parameter in wide.named_parameters():
            moved[name] |= parameter.grad != 0
    for name, flags in moved.items():
        if "embedding" not in name and "relative" not in name:  # tokens that did not occur
            assert float(flags.float().mean()) > 0.95, name


# --- depth


def test_layers_are_laid_out_as_the_papers_do():
    def order(*how):
        return [layer.source for layer in plan_layers(*how)]

    assert order(3, 8, "stack") == [0, 1, 2, 0, 1, 2, 1, 2]
    assert order(3, 8, "interpolate") == [0, 0, 0, 1, 1, 1, 2, 2]
    assert order(3, 3, "interpolate") == order(3, 3, "stack") == [0, 1, 2]
    assert plan_layers(1, 2, "identity") == [Layer(0), Layer(0, is_identity=True)]


@pytest.mark.parametrize("depth", ["stack", "interpolate"])
@pytest.mark.parametrize("experts", [0, 3])
def test_stacked_layers_are_copies_and_change_the_function(depth, experts):
    model = random_model(replace(SMALL, num_experts=experts))
    growth, deep = grown(model, num_encoder_layers=4, num_decoder_layers=3, depth=depth)
    assert not growth.is_exact
    assert difference(model, deep) > 1e-3
    old, new = model.state_dict(), deep.state_dict()
    source = [layer.source for layer in growth.layers["decoder"]]
    for index, origin in enumerate(source):
        name = "decoder.layers.{}.cross_attention.out.weight"
        assert torch.equal(new[name.format(index)], old[name.format(origin)])
        if experts:
            name = "experts.layers.decoder-{}.wo"
            assert torch.equal(new[name.format(index)], old[name.format(origin)])
    assert torch.equal(new["encoder.relative_bias.weight"], old["encoder.relative_bias.weight"])


def test_what_is_new_under_aki_is_of_the_layer_above():
    model = random_model(SMALL)
    growth, wide = grown(model, d_ff=15, width="aki")
    old, new = model.state_dict(), wide.state_dict()
    name = "encoder.layers.{}.feed_forward.wi_0.weight"
    assert torch.equal(new[name.format(0)][:10], old[name.format(0)])
    assert torch.equal(new[name.format(0)][10:], old[name.format(1)][:5])
    assert torch.equal(new[name.format(1)][10:], old[name.format(1)][:5])  # the top is its own
    assert not growth.is_exact


# --- plans


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"d_model": 8}, "d_model is 8, less than the model's 12"),
        ({"num_heads": 2}, "num_heads is 2, less than the model's 3"),
        ({"num_decoder_layers": 1}, "num_decoder_layers is 1, less than the model's 2"),
        ({"gated": False}, "gated is False, that of the model True; it cannot grow"),
        ({"vocab_size": 50}, r"vocab_size is 50, that of the model 40; give \[vocabulary\]"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused(sizes, message):
    plan = GrowthPlan(target=replace(SMALL, **sizes))
    with pytest.raises(ConfigError, match=message):
        prepare_growth(SMALL, plan)


def test_experts_are_given_to_dense_models_only():
    sparse = replace(SMALL, num_experts=3)
    with pytest.raises(ConfigError, match="only a dense model can be given experts"):
        prepare_growth(sparse, GrowthPlan(target=replace(sparse, num_experts=6)))
    with pytest.raises(ConfigError, match="router is default, that of the model cpm_2"):
        prepare_growth(sparse, GrowthPlan(target=replace(sparse, router="default")))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"noise": -1.0}, "noise is -1.0; it must be 0 or more"),
        ({"noise": 0.1}, "but width pad makes none"),
        ({"split": "uneven"}, "but width pad makes none"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_an_impossible_plan_is_refused(how, message):
    with pytest.raises(ConfigError, match=message):
        GrowthPlan(target=SMALL, **how)


def test_a_plan_without_growth_changes_nothing():
    model = random_model(SMALL)
    growth, same = grown(model)
    assert growth.target == SMALL
    assert not describe(growth)
    for name, tensor in same.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_the_same_seed_grows_the_same_model():
    model = random_model(SMALL)
    first, again, other = (
        grown(model, d_model=20, num_heads=4, seed=seed)[1].state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_tensor_that_growth_does_not_know_is_refused():
    with pytest.raises(ValueError, match="growth knows no such tensor"):
        parameter_roles("decoder.layers.0.adapter.down")


# --- soft prompts


@given(sizes, st.sampled_from(["pad", "isometric", "fpi"]), st.booleans())
@settings(max_examples=20)
def test_a_grown_prompt_gives_what_it_gave(big, width, tied):
    if width == "fpi":
        big["d_model"] = 24
    model = random_model(replace(SMALL, tied_embeddings=tied))
    growth, wide = grown(model, **big, width=width)
    generator = torch.Generator().manual_seed(4)
    prompt_PD = torch.randn(5, SMALL.d_model, generator=generator)

    def scores(read: Transformer, vectors: torch.Tensor) -> torch.Tensor:
        ids = random_ids(1, 8, 2).remainder(SMALL.vocab_size)
        x_BSD = torch.cat([vectors.unsqueeze(0), read.embedding(ids)], 1)
        segments = torch.ones(1, 13, dtype=torch.int64)
        with torch.no_grad():
            encoded = read.encode(torch.zeros_like(segments), segments, x_BSD)
            return read.logits(read.decode(ids, segments[:, :8], encoded, segments))

    before = scores(model, prompt_PD)
    after = scores(wide, grow_prompt(prompt_PD, growth.stream))
    assert float((before - after).abs().max()) <= 1e-5
    assert float((before - scores(model, prompt_PD * 0)).abs().max()) > 1e-3
