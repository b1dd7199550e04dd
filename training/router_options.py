"""What training does to routers and experts beyond the model's own rule: noise, drop, penalties.

All randomness is a function of seed, batch and layer, so that a run resumes exactly, and a block
that is computed again in the backward pass computes the same.
"""

import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from engine.model.moe import Assign, MoELayer
from engine.model.topk import AnyMoE, TopKLayer
from engine.model.transformer import Transformer
from training.losses import balance_penalty, router_z_penalty
from training.recipe import TrainRecipe


@contextmanager
def router_options(
    model: Transformer, recipe: TrainRecipe, number: int
) -> Iterator[dict[str, Tensor]]:
    """Noise, drop and penalties for the forward pass of one batch.

    Yields the penalty of each layer, weighted and filled in as the layers are computed.
    """
    penalties: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for layer in model.moe_layers():
            key = zlib.crc32(f"{recipe.seed} {number} {layer.name}".encode())
            if recipe.router_noise and isinstance(layer, MoELayer):
                stack.enter_context(_noisy(layer, recipe.router_noise, key))
            if recipe.expert_drop:
                hook = layer.register_forward_hook(_dropper(recipe.expert_drop, key))
                stack.callback(hook.remove)
            if recipe.balance_loss or recipe.router_z_loss:
                hook = layer.register_forward_pre_hook(_watcher(recipe, penalties))
                stack.callback(hook.remove)
        yield penalties


@contextmanager
def _noisy(layer: MoELayer, deviation: float, key: int) -> Iterator[None]:
    plain = layer.assign
    layer.assign = noisy_assign(plain, deviation, key)
    try:
        yield
    finally:
        layer.assign = plain


def noisy_assign(plain: Assign, deviation: float, key: int) -> Assign:
    """A rule that adds noise to the scores before it assigns; the same noise each time."""

    def assign(scores_NE: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(key)
        noise_NE = torch.randn(scores_NE.shape, generator=generator) * deviation
        return plain(scores_NE + noise_NE.to(scores_NE))

    return assign


def _dropper(share: float, key: int):  # type: ignore[no-untyped-def]  # a hook of torch's own kind
    def drop(_layer: object, inputs: tuple[Tensor, object], output: Tensor) -> Tensor:
        x = inputs[0]
        generator = torch.Generator().manual_seed(key + 1)
        kept = torch.rand((*x.shape[:-1], 1), generator=generator) >= share
        return x + (output - x) * (kept / (1 - share)).to(output)

    return drop


def _watcher(recipe: TrainRecipe, penalties: dict[str, Tensor]):  # type: ignore[no-untyped-def]
    def watch(layer: AnyMoE, inputs: tuple[Tensor, object]) -> None:
        x_ND = inputs[0].flatten(0, -2)
        if isinstance(layer, TopKLayer):
            x_ND = layer.norm(x_ND)
        scores_NE = layer.scores(x_ND)
        penalty = recipe.router_z_loss * router_z_penalty(scores_NE)
        if recipe.balance_loss:
            if isinstance(layer, TopKLayer):
                chosen = layer.route(x_ND).experts.flatten()
            else:
                chosen = layer.assign(scores_NE.detach())
            penalty = penalty + recipe.balance_loss * balance_penalty(scores_NE, chosen)
        penalties.setdefault(layer.name, penalty)

    return watch
