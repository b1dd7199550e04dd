"""Floating-point operations of a model, for curves of loss against compute.

A multiplication and an addition count as two; norms, softmax and look-ups, which are small, as
none. Backward costs twice forward. Of experts only those count that a token goes to.
"""

from typing import NamedTuple

from engine.config import ModelConfig, Stack

STACKS: tuple[Stack, ...] = ("encoder", "decoder")


class Flops(NamedTuple):
    """Operations of a forward pass: all of them, and those of the routers among them."""

    total: int
    routers: int


def layer_flops(config: ModelConfig, layer: str, source_tokens: int, target_tokens: int) -> Flops:
    """One row through one layer ('encoder-0').

    Attention counts as computed, over whole rows, masked or not.
    """
    inner = config.num_heads * config.d_kv
    width, matrices = config.d_model, 3 if config.gated else 2

    def attention(queries: int, keys: int) -> int:
        projections = 2 * width * inner * (2 * queries + 2 * keys)
        return projections + 4 * queries * keys * inner

    is_encoder = layer.startswith("encoder")
    tokens = source_tokens if is_encoder else target_tokens
    total = attention(tokens, tokens)
    if not is_encoder and not config.is_decoder_only:
        total += attention(target_tokens, source_tokens)
    neurons, routers = config.d_ff, 0
    if layer in config.moe_layers():
        neurons = config.num_experts_per_token * config.expert_width + config.shared_d_ff
        routers = tokens * 2 * width * config.num_experts
    return Flops(total + tokens * 2 * width * neurons * matrices + routers, routers)


def forward_flops(config: ModelConfig, source_tokens: int, target_tokens: int) -> Flops:
    """One row: encoder over its source tokens, decoder and head over its target tokens."""
    head = 2 * target_tokens * config.d_model * config.vocab_size
    layers = [
        layer_flops(config, f"{stack}-{index}", source_tokens, target_tokens)
        for stack in STACKS
        for index in range(config.num_layers(stack))
    ]
    routers = sum(layer.routers for layer in layers)
    return Flops(head + sum(layer.total for layer in layers), routers)


def backward_flops(config: ModelConfig, forward: Flops) -> int:
    """The backward pass of what was computed forward. No gradient goes through a fixed router."""
    is_trained = config.router == "base_layer" or config.is_top_k
    return 2 * forward.total - (0 if is_trained else 2 * forward.routers)


def training_flops(config: ModelConfig, source_tokens: int, target_tokens: int) -> int:
    """Forward and backward of one row."""
    forward = forward_flops(config, source_tokens, target_tokens)
    return forward.total + backward_flops(config, forward)
