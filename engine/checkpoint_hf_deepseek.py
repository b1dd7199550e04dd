"""Hugging Face checkpoints of DeepSeek-V2 and V3: latent attention, shared and routed experts.

Source: DeepSeek-V2 (arXiv:2405.04434), DeepSeek-V3 (arXiv:2412.19437).
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from engine.checkpoint_hf_config import Values, read_flag, read_integer, read_number, require
from engine.checkpoint_hf_llama import LLAMA, MATRICES, is_frequencies, llama_recipes, map_llama
from engine.checkpoint_hf_moe import BLOCK, experts, moe
from engine.checkpoint_hf_recipes import Checkpoint, Make, Recipe, linear, stack, vector
from engine.checkpoint_hf_rotary import latent_attention_factor
from engine.config import ModelConfig, Router
from engine.config_parts import LatentAttention
from engine.errors import ConfigError

LATENT_EPS = 1e-6  # of the norms of queries' and keys' latents, whatever the config tells
LAYER = re.compile(r"model\.layers\.(\d+)\.")


def map_deepseek_v2(values: Values) -> ModelConfig:
    """Translate the config.json of a DeepSeek-V2."""
    require(values, "topk_method", "greedy", "group_limited_greedy")
    require(values, "scoring_func", "softmax")
    require(values, "norm_topk_prob", False, None)
    groups = values.get("topk_method") == "group_limited_greedy"
    return replace(
        _map_deepseek(values, "softmax"),
        expert_groups=read_integer(values, "n_group", 1) if groups else 1,
        top_groups=read_integer(values, "topk_group", 1) if groups else 1,
        group_score="best",
    )


def map_deepseek_v3(values: Values) -> ModelConfig:
    """Translate the config.json of a DeepSeek-V3 or R1."""
    require(values, "topk_method", "noaux_tc")
    require(values, "scoring_func", "sigmoid")
    return replace(
        _map_deepseek(values, "sigmoid"),
        choice_bias=True,
        expert_groups=read_integer(values, "n_group", 1),
        top_groups=read_integer(values, "topk_group", 1),
        group_score="best_two",
        normalize_gates=read_flag(values, "norm_topk_prob", default=True),
    )


def _map_deepseek(values: Values, router: Router) -> ModelConfig:
    plain = read_integer(values, "qk_nope_head_dim")
    turned = read_integer(values, "qk_rope_head_dim")
    config = map_llama(values, head_width=plain + turned, rotary_width=turned)
    require(values, "num_key_value_heads", config.num_heads, None)
    require(values, "moe_layer_freq", 1)
    require(values, "mlp_bias", False)
    if config.norm_eps != LATENT_EPS:
        raise ConfigError(
            f"rms_norm_eps is {config.norm_eps}, which is not supported; supported: {LATENT_EPS}, "
            "that of the norms of latents"
        )
    bias, width = read_flag(values, "attention_bias"), read_integer(values, "moe_intermediate_size")
    num_dense = read_integer(values, "first_k_dense_replace", 0)
    return replace(
        config,
        num_kv_heads=0,
        latent=LatentAttention(
            rank=read_integer(values, "kv_lora_rank"),
            query_rank=read_integer(values, "q_lora_rank", 0),
            plain_width=plain,
            value_width=read_integer(values, "v_head_dim"),
        ),
        attention_scale=config.attention_scale * latent_attention_factor(values),
        qkv_bias=bias,
        out_bias=bias,
        router=router,
        num_experts=read_integer(values, "n_routed_experts"),
        num_experts_per_token=read_integer(values, "num_experts_per_tok"),
        expert_d_ff=width,
        shared_d_ff=width * read_integer(values, "n_shared_experts", 0),
        routed_scale=read_number(values, "routed_scaling_factor", 1.0),
        dense_layers=tuple(
            f"decoder-{index}" for index in range(min(num_dense, config.num_decoder_layers))
        ),
    )


def latent_attention(checkpoint: Checkpoint, ours: str, theirs: str) -> Iterator[Recipe]:
    """The products through latents; rows that turn in neighbouring pairs are put in halves."""
    config = checkpoint.config
    latent, rotary = config.latent, config.rotary
    assert latent is not None
    assert rotary is not None
    is_paired = checkpoint.values.get("rope_interleave") is not False

    def turned(head_width: int) -> Make:
        return partial(put_in_halves, rotary.width, head_width) if is_paired else stack

    bias, rows = config.qkv_bias, config.num_heads * config.d_kv
    if latent.query_rank:
        down = {f"{theirs}.q_a_proj": latent.query_rank}
        yield from linear(f"{ours}.query_down", down, config.d_model, bias=bias)
        yield from vector(f"{ours}.query_norm", f"{theirs}.q_a_layernorm", latent.query_rank)
        up = {f"{theirs}.q_b_proj": rows}
        yield from linear(f"{ours}.query_up", up, latent.query_rank, make=turned(config.d_kv))
    else:
        query = {f"{theirs}.q_proj": rows}
        yield from linear(f"{ours}.query", query, config.d_model, make=turned(config.d_kv))
    both = latent.rank + rotary.width
    down, name = {f"{theirs}.kv_a_proj_with_mqa": both}, f"{ours}.key_value_down"
    yield from linear(name, down, config.d_model, bias=bias, make=turned(both))
    yield from vector(f"{ours}.key_value_norm", f"{theirs}.kv_a_layernorm", latent.rank)
    up = {f"{theirs}.kv_b_proj": config.num_heads * (latent.plain_width + latent.value_width)}
    yield from linear(f"{ours}.key_value_up", up, latent.rank)
    out, inputs = {f"{theirs}.o_proj": config.d_model}, config.num_heads * latent.value_width
    yield from linear(f"{ours}.out", out, inputs, bias=config.out_bias)


def put_in_halves(width: int, head_width: int, parts: list[Tensor]) -> tuple[Tensor]:
    """Reorder the last `width` rows of each head: pairs (0, 1), (2, 3) become (0, 2), (1, 3).

    With width 4 of heads of 6: rows 0 1 2 3 4 5 come as 0 1 2 4 3 5.
    """
    (rows,) = parts
    plain = head_width - width
    turning = torch.arange(plain, head_width)
    order = torch.cat([torch.arange(plain), turning[0::2], turning[1::2]])
    heads = rows.view(-1, head_width, *rows.shape[1:])
    return (heads[:, order].flatten(0, 1),)


def is_unused(key: str, config: ModelConfig, values: Values) -> bool:
    """Whether a key is of the layers that foretell further tokens, which lie after the last one."""
    found = LAYER.match(key)
    num_extra = read_integer(values, "num_nextn_predict_layers", 0)
    extra = range(config.num_decoder_layers, config.num_decoder_layers + num_extra)
    return (found is not None and int(found[1]) in extra) or is_frequencies(key, config, values)


DEEPSEEK_V2 = replace(
    LLAMA,
    map_config=map_deepseek_v2,
    dense=partial(llama_recipes, latent_attention, partial(moe, BLOCK, "shared_experts")),
    experts=partial(experts, BLOCK, MATRICES),
)
DEEPSEEK_V3 = replace(DEEPSEEK_V2, map_config=map_deepseek_v3, is_ignored=is_unused)
