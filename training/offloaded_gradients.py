"""Gradients through experts that are only lent: in the backward pass they are borrowed again.

Shape letters: N tokens, R tokens of one expert, D model width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.model.layers import feed_forward
from engine.model.moe import ExpertSource, MoELayer, count_tokens
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


def _compute(layer: MoELayer, x_ND: Tensor, expert_N: Tensor, experts: ExpertSource) -> Tensor:
    if not torch.is_grad_enabled():
        return MoELayer.compute(layer, x_ND, expert_N, experts)
    return _Lent.apply(x_ND, expert_N, layer, experts)  # type: ignore[no-any-return, no-untyped-call]


class _Lent(torch.autograd.Function):
    """What the experts add, with a backward pass that borrows them again."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, expert_N: Tensor, layer: MoELayer, experts: ExpertSource
    ) -> Tensor:
        ctx.save_for_backward(x_ND, expert_N)
        ctx.layer, ctx.experts = layer, experts
        return MoELayer.compute(layer, x_ND, expert_N, experts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad_ND,) = grads
        x_ND, expert_N = ctx.saved_tensors
        layer: MoELayer = ctx.layer
        order_N = expert_N.argsort(stable=True)
        counts_E = count_tokens(expert_N, layer.config.num_experts)
        rows = dict(enumerate(torch.split(order_N, counts_E)))
        wanted = sorted(filter(counts_E.__getitem__, rows), key=lambda e: -counts_E[e])
        found_ND = torch.zeros_like(x_ND)
        for expert, weights in ctx.experts.stream(layer.name, wanted):
            rows_R = rows[expert]
            with torch.enable_grad():
                x_RD = x_ND[rows_R].detach().requires_grad_()
                y_RD = feed_forward(x_RD, weights, layer.config)
            (found_ND[rows_R],) = torch.autograd.grad(y_RD, x_RD, grad_ND[rows_R])
        return found_ND, None, None, None
