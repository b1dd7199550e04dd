from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from engine.model.initial import initialize
from engine.model.transformer import Transformer
from tests.tiny import DENSE, random_ids
from training.flops import forward_flops, training_flops

CONFIGS = {
    "gated": DENSE,
    "plain": replace(DENSE, gated=False, num_decoder_layers=3),
    "tied": replace(DENSE, tied_embeddings=True),
    "cpm_2": replace(DENSE, num_experts=4),
    "softmax": replace(
        DENSE,
        num_experts=4,
        router="softmax",
        num_experts_per_token=2,
        dense_layers=("encoder-0",),
        shared_d_ff=8,
        expert_d_ff=20,
    ),
    "base_layer": replace(DENSE, num_experts=3, router="base_layer", num_encoder_layers=1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_operations_are_those_that_torch_counts(name):
    config = CONFIGS[name]
    model = Transformer(config)
    initialize(model, 0, centroid_gain=1.0)
    rows, source, target = 2, 24, 16
    ids, ones = random_ids(rows, source), torch.ones(rows, source, dtype=torch.int64)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        scores = model(ids, ones, ids[:, :target], ones[:, :target])
        forward = counter.get_total_flops()
        scores.sum().backward()
    assert forward == rows * forward_flops(config, source, target).total
    whole = rows * training_flops(config, source, target)
    assert counter.get_total_flops() == whole


def test_only_active_experts_count():
    few, many = (replace(DENSE, num_experts=count) for count in (2, 64))
    extra = forward_flops(many, 10, 5).total - forward_flops(few, 10, 5).total
    assert extra == 62 * 2 * DENSE.d_model * (2 * 10 + 2 * 5)  # the routers alone
