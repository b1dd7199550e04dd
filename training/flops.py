"""Floating-point operations of a model, for curves of loss against compute.

A multiplication and an addition count as two; norms, softmax and look-ups, which are small, as
none. Backward costs twice forward. Of experts only those count that a token goes to.
"""

from typing import NamedTuple

from engine.config import ModelConfig


class Flops(NamedTuple):
    """Operations of a forward pass: all of them, and those of the routers among them."""

    total: int
    routers: int


def forward_flops(config: ModelConfig, source_tokens: int, target_tokens: int) -> Flops:
    """One row: encoder over its source tokens, decoder and head over its target tokens.

    Attention counts as computed, over whole rows, masked or not.
    """
    inner = config.num_heads * config.d_kv
    width, matrices = config.d_model, 3 if config.gated else 2
    feed_forward = 2 * width * config.d_ff * matrices  # per token
    router = 2 * width * config.num_experts

    def attention(queries: int, keys: int) -> int:
        projections = 2 * width * inner * (2 * queries + 2 * keys)
        return projections + 4 * queries * keys * inner

    encoder = attention(source_tokens, source_tokens) + source_tokens * feed_forward
    decoder = attention(target_tokens, target_tokens) + target_tokens * feed_forward
    decoder += attention(target_tokens, source_tokens)
    head = 2 * target_tokens * width * config.vocab_size
    routers = router * (
        config.num_encoder_layers * source_tokens + config.num_decoder_layers * target_tokens
    )
    stacks = config.num_encoder_layers * encoder + config.num_decoder_layers * decoder
    return Flops(stacks + head + routers, routers)


def training_flops(config: ModelConfig, source_tokens: int, target_tokens: int) -> int:
    """Forward and backward of one row. No gradient goes through routers but base_layer's."""
    total, routers = forward_flops(config, source_tokens, target_tokens)
    return 3 * total - (0 if config.router == "base_layer" else 2 * routers)
