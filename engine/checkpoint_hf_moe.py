"""Hugging Face checkpoints of Mixtral, Phi-MoE, Qwen2-MoE, Qwen3-MoE and OLMoE.

A Llama's layers with experts, which differ in how theirs are called and weighed.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

from engine.checkpoint_hf_config import (
    Values,
    read_flag,
    read_integer,
    read_list,
    read_number,
    require,
)
from engine.checkpoint_hf_llama import (
    LLAMA,
    MATRICES,
    gated,
    llama_attention,
    llama_recipes,
    map_llama,
    read_windows,
)
from engine.checkpoint_hf_recipes import Checkpoint, Family, Recipe, linear, matrix
from engine.config import ModelConfig

BLOCK, MIXTRAL_BLOCK = "mlp", "block_sparse_moe"
MIXTRAL_MATRICES = {"wi_0": "w1", "wi_1": "w3", "wo": "w2"}


def map_mixtral(values: Values) -> ModelConfig:
    """Translate the config.json of a Mixtral."""
    config = map_llama(values, theta=1e6)
    return replace(
        config,
        windows=read_windows(values, config, [True] * config.num_decoder_layers),
        num_experts=read_integer(values, "num_local_experts"),
        num_experts_per_token=read_integer(values, "num_experts_per_tok"),
        router="softmax",
        normalize_gates=True,
    )


def map_phimoe(values: Values) -> ModelConfig:
    """Translate the config.json of a Phi-3.5-MoE. Source: GRIN (arXiv:2409.12136)."""
    config = map_llama(values, theta=1e6)
    require(values, "num_experts_per_tok", 2)
    bias = read_flag(values, "attention_bias")
    return replace(
        config,
        windows=read_windows(values, config, [True] * config.num_decoder_layers),
        norm="layer",
        norm_bias=True,
        qkv_bias=bias,
        out_bias=bias,
        head_bias=read_flag(values, "lm_head_bias"),
        num_experts=read_integer(values, "num_local_experts"),
        num_experts_per_token=2,
        router="sparsemixer",
        router_jitter=read_number(values, "router_jitter_noise", 0.01),
    )


def map_qwen2_moe(values: Values) -> ModelConfig:
    """Translate the config.json of a Qwen2-MoE: experts beside one that all tokens go through."""
    return replace(
        _map_qwen_moe(values),
        qkv_bias=read_flag(values, "qkv_bias", default=True),
        shared_d_ff=read_integer(values, "shared_expert_intermediate_size"),
        shared_gate=True,
    )


def map_qwen3_moe(values: Values) -> ModelConfig:
    """Translate the config.json of a Qwen3-MoE."""
    bias = read_flag(values, "attention_bias")
    return replace(_map_qwen_moe(values), query_key_norm="head", qkv_bias=bias, out_bias=bias)


def _map_qwen_moe(values: Values) -> ModelConfig:
    config = map_llama(values)
    layers = range(config.num_decoder_layers)
    dense = read_list(values, "mlp_only_layers", int) or ()
    step = max(read_integer(values, "decoder_sparse_step", 1), 1)
    sliding = [read_flag(values, "use_sliding_window")] * len(layers)
    if values.get("model_type") == "qwen2_moe":
        require({**values, "use_sliding_window": sliding[0]}, "use_sliding_window", False)
    return replace(
        config,
        windows=read_windows(values, config, sliding),
        num_experts=read_integer(
            {"num_experts": values.get("num_local_experts"), **values}, "num_experts"
        ),
        num_experts_per_token=read_integer(values, "num_experts_per_tok"),
        expert_d_ff=read_integer(values, "moe_intermediate_size"),
        router="softmax",
        normalize_gates=read_flag(values, "norm_topk_prob"),
        dense_layers=tuple(f"decoder-{i}" for i in layers if i in dense or (i + 1) % step),
    )


def map_olmoe(values: Values) -> ModelConfig:
    """Translate the config.json of an OLMoE, whose norms of queries and keys span all heads."""
    require(values, "sliding_window", None)
    bias = read_flag(values, "attention_bias")
    return replace(
        map_llama(values),
        query_key_norm="width",
        clip_qkv=read_number(values, "clip_qkv", 0.0),
        qkv_bias=bias,
        out_bias=bias,
        num_experts=read_integer(values, "num_experts"),
        num_experts_per_token=read_integer(values, "num_experts_per_tok"),
        router="softmax",
        normalize_gates=read_flag(values, "norm_topk_prob"),
    )


def moe(
    block: str, shared: str, checkpoint: Checkpoint, ours: str, theirs: str
) -> Iterator[Recipe]:
    """What a MoE layer has beside its experts; theirs call the layer `block`."""
    config = checkpoint.config
    router = {f"{theirs}.{block}.gate": config.num_experts}
    yield from linear(f"{ours}.router", router, config.d_model, bias=config.router_bias)
    if config.choice_bias:
        key = f"{theirs}.{block}.gate.e_score_correction_bias"
        yield matrix(f"{ours}.choice_bias", key, (config.num_experts,))
    if config.shared_d_ff:
        key = f"{theirs}.{block}.{shared}"
        yield from gated(config, f"{ours}.shared", key, config.shared_d_ff)
    if config.shared_gate:
        gate = {f"{theirs}.{block}.{shared}_gate": 1}
        yield from linear(f"{ours}.shared_gate", gate, config.d_model)


def experts(
    block: str, names: Mapping[str, str], checkpoint: Checkpoint, layer: str, expert: int
) -> Iterator[Recipe]:
    """The matrices of one expert, each a tensor of its own."""
    theirs = f"model.layers.{layer.split('-')[1]}.{block}.experts.{expert}"
    shapes = checkpoint.config.expert_shapes()
    for name, key in names.items():
        outputs, inputs = shapes[name]
        yield matrix(name, f"{theirs}.{key}.weight", (outputs, inputs))


QWEN2_MOE = replace(
    LLAMA,
    map_config=map_qwen2_moe,
    dense=partial(llama_recipes, llama_attention, partial(moe, BLOCK, "shared_expert")),
    experts=partial(experts, BLOCK, MATRICES),
)
QWEN3_MOE = replace(QWEN2_MOE, map_config=map_qwen3_moe)
OLMOE = replace(QWEN2_MOE, map_config=map_olmoe)
MIXTRAL = replace(
    LLAMA,
    map_config=map_mixtral,
    dense=partial(llama_recipes, llama_attention, partial(moe, MIXTRAL_BLOCK, "")),
    experts=partial(experts, MIXTRAL_BLOCK, MIXTRAL_MATRICES),
)
PHIMOE: Family = replace(MIXTRAL, map_config=map_phimoe)
