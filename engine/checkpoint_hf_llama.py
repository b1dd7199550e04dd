"""Hugging Face checkpoints of Llama and of the dense models like it: Mistral, Qwen2, Qwen3.

Their names are those of many families, which take from here what they share.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from re import compile as compile_pattern

from engine.checkpoint_hf_config import (
    Values,
    head_scale,
    read_activation,
    read_flag,
    read_ids,
    read_integer,
    read_list,
    read_number,
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
from engine.checkpoint_hf_rotary import read_long_rotary, read_rotary
from engine.config import ModelConfig
from engine.errors import ConfigError

MATRICES = {"wi_0": "gate_proj", "wi_1": "up_proj", "wo": "down_proj"}
# files of old carry what is worked out from the config
FREQUENCIES = compile_pattern(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")

Layer = Callable[[Checkpoint, str, str], Iterator[Recipe]]  # of our prefix and theirs


def map_llama(
    values: Values, *, theta: float = 10000.0, head_width: int = 0, rotary_width: int = 0
) -> ModelConfig:
    """Translate what a Llama's config.json and those like it have; whether it is tied is not.

    `theta` stands where the config tells none. Heads are as wide as the config tells, or
    `head_width`, of which `rotary_width` numbers turn with positions: all, if it is 0.

    Raises ConfigError if it tells of something that is not supported.
    """
    d_model, num_heads = (
        read_integer(values, "hidden_size"),
        _positive(values, "num_attention_heads"),
    )
    eos, pad = read_ids(values, "eos_token_id"), read_pad(values)
    head_width = head_width or read_integer(values, "head_dim", d_model // num_heads)
    rotary = read_rotary(values, rotary_width or head_width, theta)
    longest = read_integer(values, "max_position_embeddings")
    long_rotary = read_long_rotary(values, rotary)
    return ModelConfig(
        vocab_size=read_integer(values, "vocab_size"),
        d_model=d_model,
        d_ff=read_integer(values, "intermediate_size"),
        d_kv=head_width,
        num_heads=num_heads,
        num_kv_heads=read_integer(values, "num_key_value_heads", num_heads),
        num_encoder_layers=0,
        num_decoder_layers=read_integer(values, "num_hidden_layers"),
        positions="rotary",
        rotary=rotary,
        attention_scale=head_scale(head_width),
        activation=read_activation(values),
        norm_eps=read_number(values, "rms_norm_eps"),
        max_positions=rotary.original_positions if long_rotary else longest,
        long_rotary=long_rotary,
        long_positions=longest if long_rotary else 0,
        pad_token_id=pad,
        decoder_start_token_id=pad,
        eos_token_ids=eos,
        continuation_sentinel=None,
        tokenizer="tokenizer_json",
    )


def _positive(values: Values, key: str) -> int:
    value = read_integer(values, key)
    if value < 1:
        raise ConfigError(f"{key} is {value}; it must be at least 1")
    return value


def read_pad(values: Values) -> int:
    """The id of padding; where there is none, which some tell by -1, that of the end."""
    told = read_integer(values, "pad_token_id", -1)
    return told if told >= 0 else (*read_ids(values, "eos_token_id"), 0)[0]


def read_windows(values: Values, config: ModelConfig, sliding: list[bool]) -> tuple[int, ...]:
    """How far each decoder layer looks back; `sliding` where `layer_types` does not tell it.

    A window that is no shorter than the longest text is none.
    """
    size = read_integer(values, "sliding_window", 0)
    kinds = read_list(values, "layer_types", str)
    if kinds is not None:
        if len(kinds) != config.num_decoder_layers:
            raise ConfigError(
                f"layer_types has {len(kinds)} entries for {config.num_decoder_layers} layers"
            )
        if other := sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"}):
            raise ConfigError(f"layer_types has {other[0]!r}, which is not supported")
        sliding = [kind == "sliding_attention" for kind in kinds]
    if not any(sliding) or not 0 < size < max(config.max_positions, config.long_positions):
        return ()
    return tuple(size if slides else 0 for slides in sliding)


def map_dense_llama(values: Values) -> ModelConfig:
    """Translate the config.json of a Llama, SmolLM and their like."""
    bias = read_flag(values, "attention_bias")
    return replace(
        map_llama(values), qkv_bias=bias, out_bias=bias, ff_bias=read_flag(values, "mlp_bias")
    )


def map_mistral(values: Values) -> ModelConfig:
    """Translate the config.json of a Mistral: a Llama each of whose layers has a window."""
    config = map_llama(values)
    return replace(config, windows=read_windows(values, config, _all(config)))


def map_qwen2(values: Values) -> ModelConfig:
    """Translate the config.json of a Qwen2, which has biases of queries, keys and values."""
    return replace(_map_qwen(values), qkv_bias=True)


def map_qwen3(values: Values) -> ModelConfig:
    """Translate the config.json of a Qwen3, which has norms of queries and keys instead."""
    bias = read_flag(values, "attention_bias")
    return replace(_map_qwen(values), query_key_norm="head", qkv_bias=bias, out_bias=bias)


def _map_qwen(values: Values) -> ModelConfig:
    config = map_llama(values)
    if not read_flag(values, "use_sliding_window"):
        return config
    first = read_integer(values, "max_window_layers", 28)
    sliding = [index >= first for index in range(config.num_decoder_layers)]
    return replace(config, windows=read_windows(values, config, sliding))


def _all(config: ModelConfig) -> list[bool]:
    return [True] * config.num_decoder_layers


def llama_recipes(
    attention: Layer, feed_forward: Layer, checkpoint: Checkpoint
) -> Iterator[Recipe]:
    """All tensors but those of experts, with a family's own attention and feed-forward."""
    config = checkpoint.config
    table = (config.vocab_size, config.d_model)
    yield matrix("embedding.weight", "model.embed_tokens.weight", table)
    if not config.tied_embeddings:
        bias = config.head_bias
        yield from linear("lm_head", {"lm_head": config.vocab_size}, config.d_model, bias=bias)
    bias = config.norm_bias
    yield from vector("decoder.norm", "model.norm", config.d_model, bias=bias)
    for index in range(config.num_decoder_layers):
        ours, theirs = f"decoder.layers.{index}", f"model.layers.{index}"
        is_sparse = f"decoder-{index}" in config.moe_layers()
        half = "moe" if is_sparse else "feed_forward"
        for name, key in (
            ("self_attention", "input_layernorm"),
            (half, "post_attention_layernorm"),
        ):
            norm = f"{ours}.{name}.norm"
            yield from vector(norm, f"{theirs}.{key}", config.d_model, bias=bias)
        yield from attention(checkpoint, f"{ours}.self_attention", f"{theirs}.self_attn")
        if is_sparse:
            yield from feed_forward(checkpoint, f"{ours}.moe", theirs)
        else:
            dense = (f"{ours}.feed_forward", f"{theirs}.mlp", config.d_ff)
            yield from gated(config, *dense, bias=config.ff_bias)


def llama_attention(checkpoint: Checkpoint, ours: str, theirs: str) -> Iterator[Recipe]:
    """Queries, keys and values of grouped heads, with the norms and sinks that some have."""
    config = checkpoint.config
    queries, keys = config.num_heads * config.d_kv, config.kv_heads * config.d_kv
    rows = {f"{theirs}.q_proj": queries, f"{theirs}.k_proj": keys, f"{theirs}.v_proj": keys}
    yield from linear(f"{ours}.qkv", rows, config.d_model, bias=config.qkv_bias)
    out = {f"{theirs}.o_proj": config.d_model}
    yield from linear(f"{ours}.out", out, queries, bias=config.out_bias)
    if config.query_key_norm != "none":
        is_head = config.query_key_norm == "head"
        widths = (config.d_kv, config.d_kv) if is_head else (queries, keys)
        yield from vector(f"{ours}.query_norm", f"{theirs}.q_norm", widths[0])
        yield from vector(f"{ours}.key_norm", f"{theirs}.k_norm", widths[1])
    if config.attention_sinks:
        yield matrix(f"{ours}.sinks", f"{theirs}.sinks", (config.num_heads,))


def gated(
    config: ModelConfig, ours: str, theirs: str, width: int, *, bias: bool = False
) -> Iterator[Recipe]:
    """The matrices of a gated feed-forward."""
    for name, key in MATRICES.items():
        outputs, inputs = (config.d_model, width) if name == "wo" else (width, config.d_model)
        yield from linear(f"{ours}.{name}", {f"{theirs}.{key}": outputs}, inputs, bias=bias)


def no_moe(_: Checkpoint, __: str, ___: str) -> Iterator[Recipe]:
    """Of a family that is always dense."""
    return iter(())


def is_frequencies(key: str, _: ModelConfig, __: Values) -> bool:
    """Whether a key is of frequencies, which files of old carry."""
    return FREQUENCIES.fullmatch(key) is not None


LLAMA = Family(
    map_config=map_dense_llama,
    dense=partial(llama_recipes, llama_attention, no_moe),
    experts=no_experts,
    is_ignored=is_frequencies,
)
MISTRAL = replace(LLAMA, map_config=map_mistral)
QWEN2 = replace(LLAMA, map_config=map_qwen2)
QWEN3 = replace(LLAMA, map_config=map_qwen3)
