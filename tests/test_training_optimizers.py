import pytest
import torch
from torch import nn
from transformers.optimization import Adafactor

from tests.tiny import MOE, tiny_model
from training.optimizers import AdafactorHF, Muon, build_optimizer, orthogonalize
from training.recipe import TrainRecipe


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(6, 4), (3, 5, 7), (9,), (1,)]
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def walk(parameters, optimizer, steps=12):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator) * 3
        optimizer.step()


@pytest.mark.parametrize("scale_parameter", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adafactor_is_that_of_hugging_face(scale_parameter, weight_decay):
    ours, theirs = weights(), weights()
    how = {"lr": 0.3, "scale_parameter": scale_parameter, "weight_decay": weight_decay}
    walk(ours, AdafactorHF(ours, **how))
    walk(theirs, Adafactor(theirs, relative_step=False, warmup_init=False, **how))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_muon_is_that_of_torch():
    ours = [nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))]
    theirs = [nn.Parameter(ours[0].detach().clone())]
    groups = [{"params": ours, "is_muon": True, "weight_decay": 0.1}]
    walk(ours, Muon(groups, lr=0.02), 4)
    how = {"lr": 0.02, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    walk(theirs, torch.optim.Muon(theirs, **how), 4)
    torch.testing.assert_close(ours[0], theirs[0], rtol=0.02, atol=2e-3)  # torch's is in bf16


def test_muon_takes_the_rest_as_adamw():
    ours, theirs = weights(), weights()
    walk(ours, Muon([{"params": ours, "weight_decay": 0.1}], lr=0.02))
    adamw = torch.optim.AdamW(theirs, lr=0.02, weight_decay=0.1, betas=(0.9, 0.98))
    walk(theirs, adamw)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_orthogonal_matrices_one_by_one(shape):
    stack = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(stack)
    for one, matrix in zip(found, stack, strict=True):
        torch.testing.assert_close(one, orthogonalize(matrix))
        singular = torch.linalg.svdvals(one)
        assert 0.5 < singular.min() <= singular.max() < 1.3


@pytest.mark.parametrize("name", ["adamw", "adafactor", "adafactor_hf", "muon"])
def test_every_trained_parameter_is_in_one_group(name):
    model = tiny_model(MOE)
    optimizer = build_optimizer(model, TrainRecipe(steps=1, optimizer=name))
    found = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_muon_is_for_the_matrices_of_blocks():
    model = tiny_model(MOE)
    blocks = build_optimizer(model, TrainRecipe(steps=1, optimizer="muon")).param_groups[0]
    names = {id(p): name for name, p in model.named_parameters()}
    ends = {names[id(p)].split(".")[-1] for p in blocks["params"]}
    chosen = {names[id(p)] for p in blocks["params"]}
    assert ends == {"weight", "wi_0", "wi_1", "wo"}
    assert "experts.layers.decoder-1.wi_1" in chosen
    assert not any("embedding" in n or "lm_head" in n or "bias" in n for n in chosen)
    assert not any("norm" in n or "centroids" in n for n in chosen)
