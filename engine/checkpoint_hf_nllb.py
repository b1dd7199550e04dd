"""Hugging Face checkpoints of NLLB-MoE, a translator with experts in every fourth layer.

Source: NLLB (arXiv:2207.04672) s6.2. A source text begins with the code of its language
("eng_Latn"), which its tokenizer.json knows as a token, and an answer with that of the other one,
which is the `decoder_prompt` of a request, or the config's `forced_bos_token_id`.
"""

import re
from collections.abc import Iterator

from engine.checkpoint_hf_config import (
    Values,
    head_scale,
    read_activation,
    read_flag,
    read_ids,
    read_integer,
    read_number,
    require,
)
from engine.checkpoint_hf_recipes import Checkpoint, Family, Recipe, linear, matrix, vector
from engine.config import ModelConfig, Stack
from engine.errors import ConfigError

STACKS: tuple[Stack, ...] = ("encoder", "decoder")
LAYER_NORM_EPS = 1e-5
POSITIONS = re.compile(r"model\.(en|de)coder\.embed_positions\.weights?")  # worked out instead


def map_nllb_moe(values: Values) -> ModelConfig:
    """Translate the config.json of an NLLB-MoE.

    Gates are scaled by what `moe_token_dropout` leaves of experts on average in training.
    Raises ConfigError if it tells of something that is not supported.
    """
    for key, allowed in {
        "router_bias": False,
        "second_expert_policy": "all",
        "normalize_router_prob_before_dropping": False,
        "moe_eval_capacity_token_fraction": 1.0,  # no token is dropped
    }.items():
        require(values, key, allowed)
    d_model, num_heads = read_integer(values, "d_model"), _same(values, "attention_heads")
    if num_heads < 1 or d_model % num_heads:
        raise ConfigError(f"encoder_attention_heads is {num_heads}; it must divide {d_model}")
    pad, layers = read_integer(values, "pad_token_id", 1), _layers(values)
    return ModelConfig(
        vocab_size=read_integer(values, "vocab_size"),
        d_model=d_model,
        d_ff=_same(values, "ffn_dim"),
        d_kv=d_model // num_heads,
        num_heads=num_heads,
        num_encoder_layers=layers["encoder"],
        num_decoder_layers=layers["decoder"],
        positions="sinusoidal",
        position_offset=pad + 1,
        embedding_scale=d_model**0.5 if read_flag(values, "scale_embedding", default=True) else 1.0,
        attention_scale=head_scale(d_model // num_heads),
        activation=read_activation(values, "activation_function"),
        gated=False,
        norm="layer",
        norm_bias=True,
        norm_eps=LAYER_NORM_EPS,
        qkv_bias=True,
        out_bias=True,
        ff_bias=True,
        num_experts=read_integer(values, "num_experts"),
        num_experts_per_token=2,
        expert_bias=True,
        router="softmax",
        normalize_gates=True,
        routed_scale=1.0 - read_number(values, "moe_token_dropout", 0.2),
        dense_layers=tuple(
            f"{stack}-{index}"
            for stack in STACKS
            for index in range(layers[stack])
            if not _is_sparse(values, stack, index)
        ),
        max_positions=read_integer(values, "max_position_embeddings", 1024),
        pad_token_id=pad,
        decoder_start_token_id=read_integer(values, "decoder_start_token_id", 2),
        eos_token_ids=read_ids(values, "eos_token_id", (2,)),
        answer_begin_ids=read_ids(values, "forced_bos_token_id"),
        continuation_sentinel=None,
        tokenizer="tokenizer_json",
    )


def _layers(values: Values) -> dict[Stack, int]:
    return {stack: read_integer(values, f"{stack}_layers") for stack in STACKS}


def _same(values: Values, key: str) -> int:
    """A size that both stacks must have in common."""
    require(values, f"decoder_{key}", read_integer(values, f"encoder_{key}"))
    return read_integer(values, f"encoder_{key}")


def _is_sparse(values: Values, stack: Stack, index: int) -> bool:
    step = read_integer(values, f"{stack}_sparse_step", 4)
    return step > 0 and (index + 1) % step == 0


def nllb_recipes(checkpoint: Checkpoint) -> Iterator[Recipe]:
    """All tensors but those of experts."""
    config, d_model = checkpoint.config, checkpoint.config.d_model
    table = (config.vocab_size, d_model)
    yield matrix("embedding.weight", NLLB_MOE.embeddings[0], table)
    if not config.tied_embeddings:
        yield matrix(NLLB_MOE.head, NLLB_MOE.head, table)
    for stack in STACKS:
        yield from vector(f"{stack}.norm", f"model.{stack}.layer_norm", d_model, bias=True)
        for index in range(config.num_layers(stack)):
            ours, theirs = f"{stack}.layers.{index}", f"model.{stack}.layers.{index}"
            is_sparse = f"{stack}-{index}" in config.moe_layers()
            half = f"{ours}.moe" if is_sparse else f"{ours}.feed_forward"
            yield from _attention(config, f"{ours}.self_attention", f"{theirs}.self_attn")
            if stack == "decoder":
                yield from _cross(config, f"{ours}.cross_attention", f"{theirs}.cross_attention")
            yield from vector(f"{half}.norm", f"{theirs}.ff_layer_norm", d_model, bias=True)
            if is_sparse:
                router = {f"{theirs}.ffn.router.classifier": config.num_experts}
                yield from linear(f"{half}.router", router, d_model)
            else:
                wide, narrow = {f"{theirs}.ffn.fc1": config.d_ff}, {f"{theirs}.ffn.fc2": d_model}
                yield from linear(f"{half}.wi_0", wide, d_model, bias=True)
                yield from linear(f"{half}.wo", narrow, config.d_ff, bias=True)


def _attention(config: ModelConfig, ours: str, theirs: str) -> Iterator[Recipe]:
    keys = [f"{theirs}.{letter}_proj" for letter in "qkv"]
    yield from _ends(config, ours, theirs)
    rows = dict.fromkeys(keys, config.d_model)
    yield from linear(f"{ours}.qkv", rows, config.d_model, bias=True)


def _cross(config: ModelConfig, ours: str, theirs: str) -> Iterator[Recipe]:
    query, *both = ({f"{theirs}.{letter}_proj": config.d_model} for letter in "qkv")
    yield from _ends(config, ours, theirs)
    yield from linear(f"{ours}.query", query, config.d_model, bias=True)
    yield from linear(f"{ours}.key_value", both[0] | both[1], config.d_model, bias=True)


def _ends(config: ModelConfig, ours: str, theirs: str) -> Iterator[Recipe]:
    yield from vector(f"{ours}.norm", f"{theirs}_layer_norm", config.d_model, bias=True)
    out = {f"{theirs}.out_proj": config.d_model}
    yield from linear(f"{ours}.out", out, config.d_model, bias=True)


def nllb_experts(checkpoint: Checkpoint, layer: str, expert: int) -> Iterator[Recipe]:
    """The tensors of one expert."""
    config, (stack, index) = checkpoint.config, layer.split("-")
    theirs = f"model.{stack}.layers.{index}.ffn.experts.expert_{expert}"
    yield matrix("wi_0", f"{theirs}.fc1.weight", (config.d_ff, config.d_model))
    yield matrix("bi_0", f"{theirs}.fc1.bias", (config.d_ff,))
    yield matrix("wo", f"{theirs}.fc2.weight", (config.d_model, config.d_ff))
    yield matrix("bo", f"{theirs}.fc2.bias", (config.d_model,))


NLLB_MOE = Family(
    map_config=map_nllb_moe,
    dense=nllb_recipes,
    experts=nllb_experts,
    embeddings=(
        "model.shared.weight",
        "model.encoder.embed_tokens.weight",
        "model.decoder.embed_tokens.weight",
    ),
    is_tied=True,
    is_ignored=lambda key, _, __: POSITIONS.fullmatch(key) is not None,
)
