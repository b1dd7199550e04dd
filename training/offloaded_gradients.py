"""Gradients through experts that are only lent: in the backward pass they are borrowed again.

Shape letters: N tokens, P pairs of a token and one of its experts, R pairs of one expert, D model
width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.model.layers import feed_forward
from engine.model.moe import ExpertSource, count_tokens, run_experts
from engine.model.topk import AnyMoE
from engine.model.transformer import Transformer


@contextmanager
def borrowed_again(model: Transformer) -> Iterator[None]:
    """The model with MoE layers that keep no weight for the backward pass.

    They keep what enters them and compute again with experts that they ask for once more, layers in
    reverse, so that slots need no more room than for serving. Gradients reach what enters, not the
    experts. Without this, gradients would be of whatever lies in the slots by then.
    """
    layers = model.moe_layers()
    for layer in layers:
        layer.compute = partial(_compute, layer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.compute


def _compute(layer: AnyMoE, x_ND: Tensor, expert_P: Tensor, experts: ExpertSource) -> Tensor:
    if not torch.is_grad_enabled():
        return _run(layer, x_ND, expert_P, experts)
    return _Lent.apply(x_ND, expert_P, layer, experts)  # type: ignore[no-any-return, no-untyped-call]


def _run(layer: AnyMoE, x_ND: Tensor, expert_P: Tensor, experts: ExpertSource) -> Tensor:
    return run_experts(layer.name, x_ND, expert_P, experts, layer.config, layer.tile_rows)


class _Lent(torch.autograd.Function):
    """What the experts add, with a backward pass that borrows them again."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, expert_P: Tensor, layer: AnyMoE, experts: ExpertSource
    ) -> Tensor:
        ctx.save_for_backward(x_ND, expert_P)
        ctx.layer, ctx.experts = layer, experts
        return _run(layer, x_ND, expert_P, experts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_PD,) = grads
        x_ND, expert_P = ctx.saved_tensors
        layer: AnyMoE = ctx.layer
        per_token = len(expert_P) // max(len(x_ND), 1)
        order_P = expert_P.argsort(stable=True)
        counts_E = count_tokens(expert_P, layer.config.num_experts)
        rows = dict(enumerate(torch.split(order_P, counts_E)))
        wanted = sorted(filter(counts_E.__getitem__, rows), key=lambda e: -counts_E[e])
        found_PD = x_ND.new_zeros(grad_PD.shape)
        for expert, weights in ctx.experts.stream(layer.name, wanted):
            rows_R = rows[expert]
            with torch.enable_grad():
                x_RD = x_ND[rows_R // per_token].detach().requires_grad_()
                y_RD = feed_forward(x_RD, weights, layer.config)
            (found_PD[rows_R],) = torch.autograd.grad(y_RD, x_RD, grad_PD[rows_R])
        return found_PD.view(len(x_ND), -1, x_ND.shape[1]).sum(1), None, None, None
