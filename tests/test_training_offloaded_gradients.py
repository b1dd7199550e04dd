"""Gradients through experts that are only lent equal those of resident ones."""

from dataclasses import replace

import pytest
import torch

from engine.checkpoint import save_model
from engine.experts import load_offloaded
from tests.tiny import DENSE, MOE, random_ids, tiny_model
from training.offloaded_gradients import borrowed_again


def input_gradient(model):
    """Gradient of some sum over logits, for the embeddings that enter the encoder."""
    model.requires_grad_(False)
    tokens, targets = random_ids(3, 12), random_ids(3, 5, seed=1)
    segments, target_segments = torch.ones_like(tokens), torch.ones_like(targets)
    segments[1, 7:] = 0
    x_BSD = model.embedding(tokens).detach().requires_grad_()
    encoded = model.encode(tokens, segments, x_BSD)
    logits = model.logits(model.decode(targets, target_segments, encoded, segments))
    logits.log_softmax(-1)[..., 7].sum().backward()
    return x_BSD.grad


@pytest.mark.parametrize("router", ["cpm_2", "default", "base_layer", "softmax"])
def test_borrowing_again_changes_no_gradient(router):
    config = replace(MOE, router=router, num_experts_per_token=2 if router == "softmax" else 1)
    resident = input_gradient(tiny_model(config))
    model = tiny_model(config)
    with borrowed_again(model):
        lent = input_gradient(model)
    assert resident.abs().max() > 1e-2
    assert torch.allclose(lent, resident, atol=1e-6)
    assert torch.equal(input_gradient(model), resident)  # as it was


def test_experts_on_the_disk_give_the_same_gradient_in_as_few_slots_as_serving(tmp_path):
    save_model(tiny_model(MOE), tmp_path, dtype=torch.float32)
    resident = input_gradient(tiny_model(MOE))
    model, experts = load_offloaded(tmp_path, torch.float32, 3 * 2**16)
    with experts, borrowed_again(model):
        forward = experts.stats.hits + experts.stats.misses
        assert torch.allclose(input_gradient(model), resident, atol=1e-6)
        asked = experts.stats.hits + experts.stats.misses - forward
    assert experts.plan.num_slots < len(MOE.moe_layers()) * MOE.num_experts
    # each layer asked twice, and never for more than it has
    assert 2 * len(MOE.moe_layers()) <= asked <= 2 * len(MOE.moe_layers()) * MOE.num_experts
    assert asked % 2 == 0


def test_a_dense_model_needs_nothing():
    model = tiny_model(DENSE)
    resident = input_gradient(model)
    with borrowed_again(model):
        assert torch.equal(input_gradient(model), resident)
