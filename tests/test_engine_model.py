import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from engine.config import CPM2_11B, CPM2_MOE_198B
from engine.model.dtypes import parse_dtype
from engine.model.initial import initialize, num_parameters
from engine.model.layers import feed_forward, relative_buckets, rms_norm
from engine.model.moe import MoELayer, ResidentExperts, assign_greedy, run_experts
from engine.model.transformer import Transformer
from tests.tiny import DENSE, MOE, random_ids, tiny_model

VARIANTS = {
    "dense": DENSE,
    "plain relu, tied, scaled": replace(
        DENSE, activation="relu", gated=False, tied_embeddings=True, scale_logits=True
    ),
    "moe": MOE,
    "moe default": replace(MOE, router="default"),
    "moe base_layer": replace(MOE, router="base_layer"),
    "uneven stacks": replace(MOE, num_encoder_layers=1, num_decoder_layers=3),
}


@pytest.mark.parametrize(
    ("config", "expected"), [(CPM2_11B, 11_087_097_856), (CPM2_MOE_198B, 198_543_978_496)]
)
def test_parameters_of_the_published_models(config, expected):
    with torch.device("meta"):
        assert num_parameters(Transformer(config)) == expected


@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
def test_incremental_decoding_equals_full_recomputation(config):
    model = tiny_model(config)
    source, target = random_ids(3, 11), random_ids(3, 9, seed=1)
    segments = torch.ones_like(source)
    segments[1, 7:] = 0  # rows of different length
    encoded = model.encode(source, segments)
    full = model.decode(target, torch.ones_like(target), encoded, segments)
    cache = model.start_cache(encoded, segments, capacity=9)
    parts = [model.step(target[:, a:b], cache) for a, b in itertools.pairwise((0, 4, 5, 7, 8, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), full, atol=2e-6, rtol=1e-5)


def test_rows_of_a_cache_may_stand_at_different_positions():
    model = tiny_model()
    source, target = random_ids(2, 5), random_ids(2, 6, seed=1)
    segments = torch.ones_like(source)
    encoded = model.encode(source, segments)
    full = model.decode(target, torch.ones_like(target), encoded, segments)
    cache = model.start_cache(encoded, segments, capacity=6)
    model.step(target[:, :4], cache)
    cache.lengths_B[1] = 2  # row 1 goes back and takes another way
    both = torch.stack([target[0, 4:6], target[1, 2:4]])
    hidden = model.step(both, cache)
    torch.testing.assert_close(hidden[0], full[0, 4:6], atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(hidden[1], full[1, 2:4], atol=2e-6, rtol=1e-5)


def test_number_formats_have_short_names():
    assert [parse_dtype(name) for name in (None, "bf16")] == [None, torch.bfloat16]
    with pytest.raises(ValueError, match="dtype is 'int3'; allowed: fp32, bf16, fp16"):
        parse_dtype("int3")


def test_a_full_cache_is_an_error():
    model = tiny_model()
    source = random_ids(1, 3)
    cache = model.start_cache(model.encode(source, torch.ones_like(source)), source > 0, 2)
    with pytest.raises(ValueError, match="3 positions do not fit the cache of 2"):
        model.step(random_ids(1, 3), cache)


@pytest.mark.parametrize("config", [DENSE, MOE], ids=["dense", "moe"])
def test_packed_documents_do_not_see_each_other(config):
    model = tiny_model(config)
    sources = [random_ids(1, n, seed=n) for n in (5, 7)]
    targets = [random_ids(1, n, seed=n) for n in (3, 4)]
    alone = [
        model(s, torch.ones_like(s), t, torch.ones_like(t))
        for s, t in zip(sources, targets, strict=True)
    ]
    number = lambda parts: torch.cat([torch.full_like(p, i + 1) for i, p in enumerate(parts)], 1)  # noqa: E731
    packed = model(torch.cat(sources, 1), number(sources), torch.cat(targets, 1), number(targets))
    # relative positions inside a document are the same wherever it stands
    torch.testing.assert_close(packed, torch.cat(alone, 1), atol=1e-5, rtol=1e-5)


def test_padding_changes_nothing():
    model = tiny_model()
    source, target = random_ids(1, 6), random_ids(1, 4)
    expected = model(source, torch.ones_like(source), target, torch.ones_like(target))
    wide = F.pad(source, (0, 5), value=0)
    segments = F.pad(torch.ones_like(source), (0, 5))
    got = model(wide, segments, target, torch.ones_like(target))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def moe_oracle(layer: MoELayer, experts: ResidentExperts, x: torch.Tensor) -> torch.Tensor:
    """The definition, token by token."""
    rows = []
    for token in x:
        seen = (
            rms_norm(token, layer.router_norm, layer.config.norm_eps)
            if layer.config.router == "cpm_2"
            else token
        )
        scores = [float(seen @ c) for c in layer.centroids]
        best = scores.index(max(scores))
        ((_, weights),) = experts.stream(layer.name, [best])
        update = feed_forward(token.unsqueeze(0), weights, layer.config)[0]
        share = (
            torch.sigmoid(torch.tensor(max(scores))) if layer.config.router == "base_layer" else 1.0
        )
        rows.append(token + share * update)
    return torch.stack(rows)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(1, 9),
    experts=st.integers(2, 6),
    router=st.sampled_from(["cpm_2", "default", "base_layer"]),
    gated=st.booleans(),
)
def test_moe_layer_equals_its_definition(seed, tokens, experts, router, gated):
    config = replace(MOE, num_experts=experts, router=router, gated=gated)
    model = tiny_model(config, seed=seed)
    layer = model.moe_layers()[0]
    torch.manual_seed(seed)
    if router == "cpm_2":
        layer.router_norm.uniform_(0.5, 2.0)
    for tensor in model.experts.layers[layer.name].parameters():
        torch.nn.init.normal_(tensor)
    x = torch.randn(tokens, config.d_model)
    with torch.no_grad():
        expected = moe_oracle(layer, model.experts, x)
        torch.testing.assert_close(layer(x, model.experts), expected, atol=1e-3, rtol=1e-4)


def test_the_lowest_expert_wins_a_tie():
    scores = torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0], [-torch.inf, -1.0, -1.0]])
    assert assign_greedy(scores).tolist() == [1, 0, 1]


class ReversedExperts:
    """Yields the last wanted expert first, and spoils each once the next is asked for."""

    def __init__(self, experts: ResidentExperts) -> None:
        self.experts = experts

    def foresee(self, layer, x):
        pass

    def stream(self, layer, wanted):
        for expert, weights in self.experts.stream(layer, list(wanted)[::-1]):
            lent = type(weights)(*(None if w is None else w.clone() for w in weights))
            yield expert, lent
            for tensor in lent:
                if tensor is not None:
                    tensor.fill_(torch.nan)


@torch.no_grad()
def test_order_of_arrival_does_not_change_the_result():
    model = tiny_model()
    x = torch.randn(2, 7, MOE.d_model)
    layer = model.moe_layers()[0]
    assert len(set(assign_greedy(layer.scores(x.flatten(0, 1))).tolist())) > 1
    backward = layer(x, ReversedExperts(model.experts))
    torch.testing.assert_close(backward, layer(x, model.experts), atol=0, rtol=0)


def test_only_wanted_experts_are_asked_for():
    model = tiny_model()
    asked = []

    class Recording(ReversedExperts):
        def stream(self, layer, wanted):
            asked.append((layer, list(wanted)))
            return super().stream(layer, wanted)

    layer = model.moe_layers()[1]
    x = torch.randn(1, 1, MOE.d_model)
    layer(x, Recording(model.experts))
    assert asked == [("encoder-1", assign_greedy(layer.scores(x[0])).tolist())]


def test_centroids_are_trained_only_where_a_gate_carries_a_gradient():
    for router, trained in (("cpm_2", False), ("default", False), ("base_layer", True)):
        model = tiny_model(replace(MOE, router=router))
        source = random_ids(1, 6)
        ones = torch.ones_like(source)
        model(source, ones, source, ones).sum().backward()
        layer = model.moe_layers()[0]
        assert layer.centroids.requires_grad is trained
        assert (layer.centroids.grad is not None) is trained
        assert model.experts.layers["encoder-0"]["wo"].grad.abs().sum() > 0


BIDIRECTIONAL = {8: 8, 12: 9, 16: 10, 23: 11, 32: 12, 46: 13, 64: 14, 91: 15}
UNIDIRECTIONAL = dict(
    zip(
        (16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113),
        range(16, 32),
        strict=True,
    )
)


def test_relative_buckets_start_where_cpm2_says():
    distance = torch.arange(200)
    left = relative_buckets(-distance, 32, 128, bidirectional=True)
    starts = {**{i: i for i in range(8)}, **BIDIRECTIONAL}
    assert left.tolist() == expand(starts, 200)
    right = relative_buckets(distance[1:], 32, 128, bidirectional=True)
    assert right.tolist() == [bucket + 16 for bucket in expand(starts, 200)[1:]]
    causal = relative_buckets(-distance, 32, 128, bidirectional=False)
    assert causal.tolist() == expand({**{i: i for i in range(16)}, **UNIDIRECTIONAL}, 200)
    assert relative_buckets(distance, 32, 128, bidirectional=False).unique().tolist() == [0]


def expand(starts: dict[int, int], length: int) -> list[int]:
    return [starts[max(s for s in starts if s <= i)] for i in range(length)]


def test_rms_norm_subtracts_no_mean_and_keeps_statistics_in_fp32():
    x = torch.tensor([[300.0, 300.0]], dtype=torch.float16)  # squares overflow fp16
    weight = torch.tensor([2.0, 1.0], dtype=torch.float16)
    torch.testing.assert_close(
        rms_norm(x, weight, 1e-6), torch.tensor([[2.0, 1.0]], dtype=torch.float16)
    )


def test_initialize_is_repeatable_and_fills_everything():
    one, two = Transformer(MOE), Transformer(MOE)
    for model in (one, two):
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
        initialize(model, seed=3)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.isfinite(a).all()
        assert torch.equal(a, b)


def test_centroids_start_orthogonal_with_gain():
    model = Transformer(MOE)
    initialize(model, seed=3)
    centroids = model.moe_layers()[0].centroids
    torch.testing.assert_close(centroids @ centroids.T, torch.eye(4) * 1e-4, atol=1e-9, rtol=1e-4)


@pytest.mark.parametrize("wanted", [[2], [3, 0], [1, 3, 2]])
def test_the_experts_of_one_token_are_those_of_the_same_token_among_others(wanted):
    config = replace(MOE, num_experts_per_token=len(wanted), router="softmax")
    experts = tiny_model(config).experts
    x_1D = torch.randn(1, config.d_model, generator=torch.Generator().manual_seed(3))
    pairs_P = torch.tensor(wanted)
    with torch.no_grad():
        alone = run_experts("decoder-1", x_1D, pairs_P, experts, config, 0)
        both = run_experts("decoder-1", x_1D.repeat(2, 1), pairs_P.repeat(2), experts, config, 0)
    torch.testing.assert_close(alone, both[: len(wanted)])
    torch.testing.assert_close(alone, both[len(wanted) :])
