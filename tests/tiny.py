"""Tiny models with random weights for the tests, on the byte tokenizer."""

from dataclasses import replace

import torch

from engine.config import ModelConfig
from engine.config_parts import Rotary
from engine.model.initial import initialize
from engine.model.transformer import Transformer
from engine.tokenizer import ByteTokenizer

DENSE = ModelConfig(
    vocab_size=384,
    d_model=32,
    d_ff=48,
    d_kv=8,
    num_heads=4,
    num_encoder_layers=2,
    num_decoder_layers=2,
    tokenizer="bytes",
    pad_token_id=0,
    decoder_start_token_id=0,
    eos_token_ids=(1,),
    max_positions=64,
)
MOE = replace(DENSE, num_experts=4)


def tiny_model(config: ModelConfig = MOE, seed: int = 0) -> Transformer:
    """A model with random weights, centroids large enough to spread the tokens over the experts."""
    model = Transformer(config)
    initialize(model, seed, centroid_gain=1.0)
    return model.eval()


def byte_tokenizer() -> ByteTokenizer:
    return ByteTokenizer()


def random_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 259, (rows, length), generator=generator)


LLAMA = ModelConfig(
    vocab_size=384,
    d_model=32,
    d_ff=48,
    d_kv=8,
    num_heads=4,
    num_kv_heads=2,
    num_encoder_layers=0,
    num_decoder_layers=3,
    activation="silu",
    positions="rotary",
    rotary=Rotary(width=8),
    attention_scale=8**-0.5,
    tokenizer="bytes",
    pad_token_id=0,
    decoder_start_token_id=0,
    eos_token_ids=(1,),
    max_positions=256,
    continuation_sentinel=None,
)
MIXTRAL = replace(
    LLAMA, num_experts=4, num_experts_per_token=2, router="softmax", normalize_gates=True
)
