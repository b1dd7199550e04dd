"""bert2BERT's first stage: train the lower part of a deepened model, a part drawn for each step.

In a recipe: `submodel_until` tells for which share of the steps, `submodel_layers` the part's size.

Source: bert2BERT (arXiv:2110.07143) s3.4.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.model.blocks import StackModule
from engine.model.transformer import Transformer
from training.flops import STACKS, backward_flops, layer_flops, training_flops
from training.recipe import Recipe


def submodel_sizes(layers: int, step: int) -> list[int]:
    """Layers of the sub-models: the bottom `step`, twice as many, and so on to all.

    Raises ConfigError if `step` is not between 1 and the layers.
    """
    if not 1 <= step <= layers:
        raise ConfigError(f"sub-models of {step} layers; allowed: 1 to {layers}")
    return [*range(step, layers, step), layers]


def draw_part(seed: int, step: int, parts: int) -> int:
    """Which of the sub-models a training step takes, from 1; the same for the same seed."""
    return random.Random(f"{seed} {step}").randint(1, parts)


def part_of_step(recipe: Recipe, step: int) -> int | None:
    """The sub-model that a step of a run trains; None if it is the whole model's."""
    train, config = recipe.train, recipe.model
    if step >= train.steps * train.submodel_until:
        return None
    layers = max(config.num_encoder_layers, config.num_decoder_layers)
    return draw_part(train.seed, step, len(submodel_sizes(layers, train.submodel_layers)))


def step_flops(
    config: ModelConfig, part: int | None, step: int, source_tokens: int, target_tokens: int
) -> int:
    """Forward and backward of one row, through the whole model or through a sub-model.

    A sub-model has no backward pass below what it trains.
    """
    lengths = source_tokens, target_tokens
    flops = training_flops(config, *lengths)
    if part is None:
        return flops
    for stack in STACKS:
        for index in range(config.num_layers(stack)):
            layer = layer_flops(config, f"{stack}-{index}", *lengths)
            top = min(part * step, config.num_layers(stack))
            if index >= top:
                flops -= layer.total
            if not top - step <= index < top:
                flops -= backward_flops(config, layer)
    return flops


@contextmanager
def submodel(model: Transformer, part: int, step: int) -> Iterator[Transformer]:
    """The model with the bottom `part` x `step` layers of each stack, all of a shorter one.

    Of it only the top `step` layers, the final norms and the head take gradients. Afterwards the
    model is whole, and takes gradients as it did.
    """
    stacks = [model.encoder, model.decoder]
    whole = [stack.layers for stack in stacks]
    took = {parameter: parameter.requires_grad for parameter in model.parameters()}
    trained = {id(p) for p in _trained(model, stacks, part, step)}
    try:
        for parameter, was in took.items():
            parameter.requires_grad_(was and id(parameter) in trained)
        for stack in stacks:
            stack.layers = stack.layers[: part * step]
        yield model
    finally:
        for stack, layers in zip(stacks, whole, strict=True):
            stack.layers = layers
        for parameter, was in took.items():
            parameter.requires_grad_(was)


def _trained(
    model: Transformer, stacks: list[StackModule], part: int, step: int
) -> Iterator[nn.Parameter]:
    """What a sub-model trains. Its experts lie outside of the layers."""
    for name, stack in (("encoder", stacks[0]), ("decoder", stacks[1])):
        yield from stack.norm.parameters()
        top = min(part * step, len(stack.layers))
        for index in range(max(top - step, 0), top):
            yield from stack.layers[index].parameters()
            layer = f"experts.layers.{name}-{index}."
            yield from (p for key, p in model.named_parameters() if key.startswith(layer))
    head = model.embedding if model.config.tied_embeddings else model.lm_head
    yield from head.parameters()
