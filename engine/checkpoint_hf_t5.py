"""Hugging Face checkpoints of T5 v1.0, v1.1, Flan-T5, mT5 and Switch Transformers.

Source: T5 (arXiv:1910.10683), mT5 (arXiv:2010.11934), Switch (arXiv:2101.03961); the names are
those of transformers 5.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from engine.checkpoint_hf_config import (
    Values,
    read_epsilon,
    read_flag,
    read_ids,
    read_integer,
    require,
)
from engine.checkpoint_hf_recipes import (
    Checkpoint,
    Family,
    Recipe,
    linear,
    matrix,
    no_experts,
    vector,
)
from engine.config import Activation, ModelConfig, Stack
from engine.errors import ConfigError

SHARED = "shared.weight"
HEAD = "lm_head.weight"
# early T5 files carry this one; no T5 code ever used it
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
# feed_forward_proj -> activation, gated; transformers takes "gated-gelu" for the tanh form
PROJECTIONS: dict[str, tuple[Activation, bool]] = {
    "relu": ("relu", False),
    "gated-relu": ("relu", True),
    "gated-gelu": ("gelu_tanh", True),
    "gelu_new": ("gelu_tanh", False),
    "gated-gelu_new": ("gelu_tanh", True),
}
STACKS: tuple[Stack, ...] = ("encoder", "decoder")


def map_t5(values: Values) -> ModelConfig:
    """Translate config.json; whether the head is tied is left to the files.

    Raises ConfigError if it tells of something that is not supported.
    """
    if values.get("tokenizer_class") == "ByT5Tokenizer":
        raise ConfigError("ByT5 is not supported: its tokenizer reads bytes, not spiece.model")
    default = "gated-gelu" if values["model_type"] == "mt5" else "relu"
    projection = values.get("feed_forward_proj", default)
    if not isinstance(projection, str) or projection not in PROJECTIONS:
        known = ", ".join(PROJECTIONS)
        raise ConfigError(f"feed_forward_proj {projection!r} is not supported; supported: {known}")
    activation, gated = PROJECTIONS[projection]
    num_layers = read_integer(values, "num_layers")
    pad = read_integer(values, "pad_token_id", 0)
    return ModelConfig(
        vocab_size=read_integer(values, "vocab_size"),
        d_model=read_integer(values, "d_model"),
        d_ff=read_integer(values, "d_ff"),
        d_kv=read_integer(values, "d_kv"),
        num_heads=read_integer(values, "num_heads"),
        num_encoder_layers=num_layers,
        num_decoder_layers=read_integer(values, "num_decoder_layers", num_layers),
        activation=activation,
        gated=gated,
        scale_logits=_scales_logits(values),
        relative_buckets=read_integer(values, "relative_attention_num_buckets", 32),
        relative_max_distance=read_integer(values, "relative_attention_max_distance", 128),
        norm_eps=read_epsilon(values),
        max_positions=read_integer(values, "n_positions", 512),
        tokenizer="sentencepiece",
        pad_token_id=pad,
        decoder_start_token_id=read_integer(values, "decoder_start_token_id", pad),
        eos_token_ids=read_ids(values, "eos_token_id", (1,)),
        continuation_sentinel=None,
    )


def _scales_logits(values: Values) -> bool:
    """T5 v1.0 scales by d_model ** -0.5; v1.1 says so by an untied config; mT5 never does.

    transformers 5 stores the answer, as it forgets the untied config when it saves.
    """
    if values["model_type"] != "t5":
        return False
    declared = values.get("scale_decoder_outputs")
    return (
        declared if isinstance(declared, bool) else values.get("tie_word_embeddings") is not False
    )


def map_switch(values: Values) -> ModelConfig:
    """Translate the config.json of a Switch Transformer.

    In each stack every so many layers, the last of them, are MoE layers. No token is dropped: each
    expert takes all that are sent to it (`expert_capacity` bounds them in training).
    Raises ConfigError if it tells of something that is not supported.
    """
    dense = map_t5(values)
    require(values, "add_router_probs", False)
    require(values, "router_bias", False)
    require(values, "dense_act_fn", "relu")
    return replace(
        dense,
        num_experts=read_integer(values, "num_experts"),
        router="softmax",
        scale_logits=read_flag(values, "tie_word_embeddings", default=True),
        dense_layers=tuple(
            f"{stack}-{index}"
            for stack in STACKS
            for index in range(dense.num_layers(stack))
            if not _is_sparse(values, stack, dense.num_layers(stack), index)
        ),
    )


def _is_sparse(values: Values, stack: Stack, num_layers: int, index: int) -> bool:
    """Whether a layer has experts: of 12 with 6 such ones layers 1, 3, ..., 11 do."""
    num_sparse = read_integer(values, f"num_sparse_{stack}_layers", 3)
    step = num_layers // num_sparse if num_sparse > 0 else num_layers
    return step > 0 and index % step == 1 % step


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor of a T5 -> the keys that, one below the other, make it up."""
    checkpoint = Checkpoint(config, {}, frozenset())
    return {
        name: tuple(part.key for part in recipe.parts)
        for recipe in t5_recipes("DenseReluDense", checkpoint)
        for name in recipe.names
    }


def t5_recipes(block: str, checkpoint: Checkpoint) -> Iterator[Recipe]:
    """All tensors but those of experts; `block` is what theirs call a feed-forward."""
    config = checkpoint.config
    table = (config.vocab_size, config.d_model)
    yield matrix("embedding.weight", SHARED, table)
    if not config.tied_embeddings:
        yield matrix(HEAD, HEAD, table)
    for stack in STACKS:
        yield from vector(f"{stack}.norm", f"{stack}.final_layer_norm", config.d_model)
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shape = (config.relative_buckets, config.num_heads)
        yield matrix(f"{stack}.relative_bias.weight", first, shape)
        for index in range(config.num_layers(stack)):
            ours, theirs = f"{stack}.layers.{index}", f"{stack}.block.{index}.layer"
            last = 2 if stack == "decoder" else 1
            yield from _attention(config, f"{ours}.self_attention", f"{theirs}.0", "SelfAttention")
            if stack == "decoder":
                cross = f"{ours}.cross_attention"
                yield from _attention(config, cross, f"{theirs}.1", "EncDecAttention")
            if f"{stack}-{index}" in config.moe_layers():
                yield from vector(f"{ours}.moe.norm", f"{theirs}.{last}.layer_norm", config.d_model)
                router = f"{theirs}.{last}.{block}.router.classifier"
                outputs = {router: config.num_experts}
                yield from linear(f"{ours}.moe.router", outputs, config.d_model)
                continue
            ff = f"{ours}.feed_forward"
            yield from vector(f"{ff}.norm", f"{theirs}.{last}.layer_norm", config.d_model)
            for name, key in _matrices(config).items():
                full, shape = f"{theirs}.{last}.{block}.{key}.weight", _ff_shape(config, name)
                yield matrix(f"{ff}.{name}.weight", full, shape)


def _attention(config: ModelConfig, ours: str, theirs: str, kind: str) -> Iterator[Recipe]:
    inner = config.num_heads * config.d_kv
    q, k, v, o = (f"{theirs}.{kind}.{letter}" for letter in "qkvo")
    yield from vector(f"{ours}.norm", f"{theirs}.layer_norm", config.d_model)
    yield from linear(f"{ours}.out", {o: config.d_model}, inner)
    if kind == "SelfAttention":
        yield from linear(f"{ours}.qkv", dict.fromkeys((q, k, v), inner), config.d_model)
    else:
        yield from linear(f"{ours}.query", {q: inner}, config.d_model)
        yield from linear(f"{ours}.key_value", {k: inner, v: inner}, config.d_model)


def _matrices(config: ModelConfig) -> dict[str, str]:
    """Our names of the matrices of a feed-forward -> theirs."""
    return {"wi_0": "wi_0", "wi_1": "wi_1", "wo": "wo"} if config.gated else _UNGATED


_UNGATED = {"wi_0": "wi", "wo": "wo"}


def _ff_shape(config: ModelConfig, name: str) -> tuple[int, int]:
    return (config.d_model, config.d_ff) if name == "wo" else (config.d_ff, config.d_model)


def switch_experts(checkpoint: Checkpoint, layer: str, expert: int) -> Iterator[Recipe]:
    """The tensors of one expert."""
    stack, index = layer.split("-")
    last = 2 if stack == "decoder" else 1
    theirs = f"{stack}.block.{index}.layer.{last}.mlp.experts.expert_{expert}"
    for name, key in _matrices(checkpoint.config).items():
        yield matrix(name, f"{theirs}.{key}.weight", _ff_shape(checkpoint.config, name))


T5 = Family(
    map_config=map_t5,
    dense=partial(t5_recipes, "DenseReluDense"),
    experts=no_experts,
    embeddings=(SHARED, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"),
    is_tied=True,
    is_ignored=lambda key, _, __: key == UNUSED,
)
SWITCH = replace(
    T5, map_config=map_switch, dense=partial(t5_recipes, "mlp"), experts=switch_experts
)
