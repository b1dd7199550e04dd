"""Hugging Face checkpoints of GPT-2, whose products are stored with inputs by outputs.

Source: GPT-2 (Radford et al. 2019); the released files lack the prefix `transformer.`.
"""

import re
from collections.abc import Iterator

from torch import Tensor

from engine.checkpoint_hf_config import (
    Values,
    head_scale,
    read_activation,
    read_epsilon,
    read_flag,
    read_ids,
    read_integer,
    require,
)
from engine.checkpoint_hf_llama import read_pad
from engine.checkpoint_hf_recipes import (
    Checkpoint,
    Family,
    Recipe,
    Stored,
    matrix,
    no_experts,
    vector,
)
from engine.config import ModelConfig
from engine.errors import ConfigError

PREFIX = "transformer."
MASKS = re.compile(r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")  # files of old carry them


def map_gpt2(values: Values) -> ModelConfig:
    """Translate the config.json of a GPT-2.

    Raises ConfigError if it tells of something that is not supported.
    """
    require(values, "scale_attn_by_inverse_layer_idx", False)
    require(values, "add_cross_attention", False)
    d_model, num_heads = read_integer(values, "n_embd"), read_integer(values, "n_head")
    if num_heads < 1 or d_model % num_heads:
        raise ConfigError(f"n_head is {num_heads}; it must divide n_embd, {d_model}")
    width = d_model // num_heads
    pad = read_pad(values)
    return ModelConfig(
        vocab_size=read_integer(values, "vocab_size"),
        d_model=d_model,
        d_ff=read_integer(values, "n_inner", 4 * d_model),
        d_kv=width,
        num_heads=num_heads,
        num_encoder_layers=0,
        num_decoder_layers=read_integer(values, "n_layer"),
        positions="learned",
        attention_scale=head_scale(width)
        if read_flag(values, "scale_attn_weights", default=True)
        else 1.0,
        activation=read_activation(values, "activation_function"),
        gated=False,
        norm="layer",
        norm_bias=True,
        qkv_bias=True,
        out_bias=True,
        ff_bias=True,
        norm_eps=read_epsilon({"layer_norm_epsilon": 1e-5, **values}),
        max_positions=read_integer(values, "n_positions", 1024),
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_ids=read_ids(values, "eos_token_id"),
        continuation_sentinel=None,
        tokenizer="tokenizer_json",
    )


def gpt2_recipes(checkpoint: Checkpoint) -> Iterator[Recipe]:
    """All tensors of a GPT-2."""
    config, d_model = checkpoint.config, checkpoint.config.d_model
    root = PREFIX if any(key.startswith(PREFIX) for key in checkpoint.keys) else ""
    table = (config.vocab_size, d_model)
    yield matrix("embedding.weight", GPT2.embeddings[0], table)
    if not config.tied_embeddings:
        yield matrix(GPT2.head, GPT2.head, table)
    yield matrix("positions.weight", f"{root}wpe.weight", (config.max_positions, d_model))
    yield from vector("decoder.norm", f"{root}ln_f", d_model, bias=True)
    for index in range(config.num_decoder_layers):
        ours, theirs = f"decoder.layers.{index}", f"{root}h.{index}"
        attention, ff = f"{ours}.self_attention", f"{ours}.feed_forward"
        yield from vector(f"{attention}.norm", f"{theirs}.ln_1", d_model, bias=True)
        yield from _turned(f"{attention}.qkv", f"{theirs}.attn.c_attn", d_model, 3 * d_model)
        yield from _turned(f"{attention}.out", f"{theirs}.attn.c_proj", d_model, d_model)
        yield from vector(f"{ff}.norm", f"{theirs}.ln_2", d_model, bias=True)
        yield from _turned(f"{ff}.wi_0", f"{theirs}.mlp.c_fc", d_model, config.d_ff)
        yield from _turned(f"{ff}.wo", f"{theirs}.mlp.c_proj", config.d_ff, d_model)


def _turned(ours: str, theirs: str, inputs: int, outputs: int) -> Iterator[Recipe]:
    weight = (Stored(f"{theirs}.weight", (inputs, outputs)),)
    yield Recipe((f"{ours}.weight",), weight, _transpose)
    yield matrix(f"{ours}.bias", f"{theirs}.bias", (outputs,))


def _transpose(parts: list[Tensor]) -> tuple[Tensor]:
    return (parts[0].T,)


GPT2 = Family(
    map_config=map_gpt2,
    dense=gpt2_recipes,
    experts=no_experts,
    embeddings=("transformer.wte.weight", "wte.weight"),
    is_tied=True,
    is_ignored=lambda key, _, __: MASKS.fullmatch(key) is not None,
)
