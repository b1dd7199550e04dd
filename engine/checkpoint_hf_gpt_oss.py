"""Hugging Face checkpoints of gpt-oss: sinks, windows in every other layer, experts with biases.

Experts are stored fused, gate and up in alternate columns: in bfloat16, or in MXFP4 by rows.
Source: the gpt-oss model card (arXiv:2508.10925).
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.checkpoint_hf_config import Values, read_flag, read_integer, require
from engine.checkpoint_hf_llama import (
    LLAMA,
    llama_attention,
    llama_recipes,
    map_llama,
    read_windows,
)
from engine.checkpoint_hf_recipes import Checkpoint, Recipe, Stored, linear
from engine.checkpoint_mxfp4 import BLOCK, BLOCK_BYTES, dequantize_mxfp4
from engine.config import ModelConfig
from engine.errors import ConfigError

YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def map_gpt_oss(values: Values) -> ModelConfig:
    """Translate the config.json of a gpt-oss."""
    require(values, "swiglu_alpha", 1.702)
    require(values, "swiglu_limit", 7.0)
    if not values.get("rope_scaling") and not values.get("rope_parameters"):
        values = {**values, "rope_parameters": YARN}
    config = map_llama(values, theta=150000.0)
    bias = read_flag(values, "attention_bias", default=True)
    every_other = [index % 2 == 0 for index in range(config.num_decoder_layers)]
    return replace(
        config,
        activation="clamped_swiglu",
        windows=read_windows(values, config, every_other),
        attention_sinks=True,
        qkv_bias=bias,
        out_bias=bias,
        num_experts=read_integer(values, "num_local_experts"),
        num_experts_per_token=read_integer(values, "num_experts_per_tok"),
        expert_bias=True,
        router="softmax",
        router_bias=True,
        normalize_gates=True,
    )


def router(checkpoint: Checkpoint, ours: str, theirs: str) -> Iterator[Recipe]:
    """What a MoE layer has beside its experts."""
    config = checkpoint.config
    outputs = {f"{theirs}.mlp.router": config.num_experts}
    yield from linear(f"{ours}.router", outputs, config.d_model, bias=True)


def fused_experts(checkpoint: Checkpoint, layer: str, expert: int) -> Iterator[Recipe]:
    """The tensors of one expert, each a row of a tensor of all."""
    config, theirs = checkpoint.config, f"model.layers.{layer.split('-')[1]}.mlp.experts"
    number, width, d_model = config.num_experts, config.expert_width, config.d_model
    up, down = f"{theirs}.gate_up_proj", f"{theirs}.down_proj"
    both = ("wi_0", "wi_1")
    if f"{up}_blocks" in checkpoint.keys:
        yield Recipe(both, _packed(up, number, 2 * width, d_model, expert), _alternate_packed)
        yield Recipe(("wo",), _packed(down, number, d_model, width, expert), _unpack)
    else:
        columns = (Stored(up, (number, d_model, 2 * width), expert),)
        yield Recipe(both, columns, _alternate_columns)
        yield Recipe(("wo",), (Stored(down, (number, width, d_model), expert),), _transpose)
    bias = (Stored(f"{up}_bias", (number, 2 * width), expert),)
    yield Recipe(("bi_0", "bi_1"), bias, _alternate)
    yield Recipe(("bo",), (Stored(f"{down}_bias", (number, d_model), expert),))


def _packed(key: str, number: int, rows: int, inputs: int, expert: int) -> tuple[Stored, Stored]:
    if inputs % BLOCK:
        raise ConfigError(f"{key} has {inputs} inputs; MXFP4 needs a multiple of {BLOCK}")
    shape = (number, rows, inputs // BLOCK)
    return (
        Stored(f"{key}_blocks", (*shape, BLOCK_BYTES), expert, torch.uint8),
        Stored(f"{key}_scales", shape, expert, torch.uint8),
    )


def _alternate(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    (rows,) = parts
    return rows[0::2], rows[1::2]


def _alternate_columns(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _alternate([parts[0].T])


def _alternate_packed(parts: list[Tensor]) -> tuple[Tensor, Tensor]:
    return _alternate([dequantize_mxfp4(*parts)])


def _transpose(parts: list[Tensor]) -> tuple[Tensor]:
    return (parts[0].T,)


def _unpack(parts: list[Tensor]) -> tuple[Tensor]:
    return (dequantize_mxfp4(*parts),)


GPT_OSS = replace(
    LLAMA,
    map_config=map_gpt_oss,
    dense=partial(llama_recipes, llama_attention, router),
    experts=fused_experts,
    quantization="mxfp4",
)
