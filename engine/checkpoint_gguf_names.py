"""What a GGUF file holds in Hugging Face's terms: its config.json, and the names of its tensors.

Source: llama.cpp's convert_hf_to_gguf.py, which makes such files, read backwards.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from engine.checkpoint_gguf_header import GgufHeader
from engine.errors import CheckpointError

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FREQUENCIES = "rope_freqs.weight"  # what Llama 3's scaling divides frequencies by
TOP = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    HEAD: "lm_head.weight",
}
BLOCK = re.compile(r"blk\.(\d+)\.(\w+?)(?:\.(\d+))?\.(weight|bias)")
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
}
EXPERTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
END_KEYS = ("eos", "eot", "eom")  # of a text, of a turn, of a message


class Origin(NamedTuple):
    """Where a tensor of Hugging Face's comes from.

    `row` of the first dimension, or all; `interleaved_heads`: of so many heads, pairs of rows that
    turn together lie side by side, and must come half a head apart; `is_row`: a vector that is to
    be a matrix of one row.
    """

    name: str
    row: int | None = None
    interleaved_heads: int = 0
    is_row: bool = False


Values = dict[str, object]


def hf_config(header: GgufHeader, frequencies: list[float] | None) -> Values:
    """The config.json of the model; `frequencies` are the content of FREQUENCIES, if it is there.

    Raises CheckpointError if the architecture is not supported, or something is missing.
    """
    architecture = header.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{header.path}: GGUF files of architecture {architecture!r} are not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    if EMBEDDING not in header.places or len(header.places[EMBEDDING].shape) != 2:
        raise CheckpointError(f"{header.path}: has no embedding, {EMBEDDING}")
    vocab_size, width = header.places[EMBEDDING].shape
    key = f"{architecture}."
    num_heads = header.integer(key + "attention.head_count")
    rotary = header.integer(key + "rope.dimension_count", width // max(num_heads, 1))
    values: Values = {
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "hidden_size": header.integer(key + "embedding_length"),
        "num_hidden_layers": header.integer(key + "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.integer(key + "attention.head_count_kv", num_heads),
        "head_dim": header.integer(key + "attention.key_length", rotary),
        "intermediate_size": header.integer(key + "feed_forward_length", 0),
        "max_position_embeddings": header.integer(key + "context_length"),
        "rms_norm_eps": header.number(key + "attention.layer_norm_rms_epsilon"),
        "rope_theta": header.number(key + "rope.freq_base", 10000.0),
        "rope_scaling": _scaling(header, key, frequencies),
        "tie_word_embeddings": HEAD not in header.places,
        **_special_ids(header),
    }
    return {**values, **ARCHITECTURES[architecture](header, key)}


def hf_names(header: GgufHeader, values: Mapping[str, object]) -> dict[str, Origin]:
    """Hugging Face's name of each tensor, and where it comes from.

    Raises CheckpointError if there is a tensor that such a model has not.
    """
    return dict(_origins(header, values))


def _origins(header: GgufHeader, values: Mapping[str, object]) -> Iterator[tuple[str, Origin]]:
    is_llama = header.text("general.architecture") == "llama"
    is_mixtral = values["model_type"] == "mixtral"
    heads = {"attn_q": values["num_attention_heads"], "attn_k": values["num_key_value_heads"]}
    for name, place in header.places.items():
        match = BLOCK.fullmatch(name)
        if name in TOP:
            yield TOP[name], Origin(name)
        elif match is not None and match[2].removesuffix("_exps") in EXPERTS | LAYER:
            layer, half, part, end = f"model.layers.{match[1]}", match[2], match[3], match[4]
            matrix = EXPERTS.get(half.removesuffix("_exps"), "")
            block = f"{layer}.{'block_sparse_moe' if is_mixtral else 'mlp'}"
            expert = f"{MIXTRAL[matrix] if is_mixtral and matrix else matrix}.{end}"
            if half.endswith("_exps"):
                for row in range(place.shape[0]):
                    yield f"{block}.experts.{row}.{expert}", Origin(name, row)
            elif part is not None and matrix:  # files of old have a tensor for each expert
                yield f"{block}.experts.{part}.{expert}", Origin(name)
            elif half == "ffn_gate_inp":
                yield f"{block}.gate.{end}", Origin(name)
            else:
                turned = heads.get(half, 0) if is_llama else 0
                is_row = half == "ffn_gate_inp_shexp" and len(place.shape) == 1
                assert isinstance(turned, int)
                yield f"{layer}.{LAYER[half]}.{end}", Origin(name, None, turned, is_row)
        elif name != FREQUENCIES:
            raise CheckpointError(
                f"{header.path}: has a tensor {name}, which no {values['model_type']} has"
            )


def _special_ids(header: GgufHeader) -> Values:
    """The ids of the end of a text or of a turn, and of padding, where there are any."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in END_KEYS]
    ends = [header.integer(key) for key in keys if key in header.metadata]
    values: Values = {"eos_token_id": list(dict.fromkeys(ends))}
    if "tokenizer.ggml.padding_token_id" in header.metadata:
        values["pad_token_id"] = header.integer("tokenizer.ggml.padding_token_id")
    return values


def _scaling(header: GgufHeader, key: str, frequencies: list[float] | None) -> Values | None:
    """How rotary positions are stretched."""
    if frequencies is not None:  # worked out already: what each frequency is divided by
        return {
            "rope_type": "longrope",
            "short_factor": frequencies,
            "long_factor": frequencies,
            "attention_factor": 1.0,
            "original_max_position_embeddings": header.integer(key + "context_length"),
        }
    kind = header.text(key + "rope.scaling.type", "none")
    if kind == "none":
        return None
    scaling: Values = {"rope_type": kind, "factor": header.number(key + "rope.scaling.factor")}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = header.integer(
            key + "rope.scaling.original_context_length"
        )
    return scaling


def _llama(header: GgufHeader, key: str) -> Values:
    """Llama, Mistral, SmolLM, or with experts Mixtral, which share an architecture there."""
    bias = "blk.0.attn_q.bias" in header.places
    if f"{key}expert_count" not in header.metadata:
        return {"model_type": "llama", "attention_bias": bias}
    return {
        "model_type": "mixtral",
        "num_local_experts": header.integer(f"{key}expert_count"),
        "num_experts_per_tok": header.integer(f"{key}expert_used_count"),
    }


def _dense(model_type: str) -> Callable[[GgufHeader, str], Values]:
    return lambda _, __: {"model_type": model_type}


def _experts(header: GgufHeader, key: str, model_type: str, *, normalizes: bool) -> Values:
    gates = header.places.get("blk.0.ffn_gate_exps.weight")
    return {
        "model_type": model_type,
        "num_experts": header.integer(f"{key}expert_count"),
        "num_experts_per_tok": header.integer(f"{key}expert_used_count"),
        "moe_intermediate_size": header.integer(
            f"{key}expert_feed_forward_length", gates.shape[1] if gates else None
        ),
        "norm_topk_prob": normalizes,
    }


def _qwen2_moe(header: GgufHeader, key: str) -> Values:
    shared = header.places.get("blk.0.ffn_gate_shexp.weight")
    width = shared.shape[0] if shared else None
    return {
        **_experts(header, key, "qwen2_moe", normalizes=False),
        "shared_expert_intermediate_size": header.integer(
            f"{key}expert_shared_feed_forward_length", width
        ),
    }


def _qwen3_moe(header: GgufHeader, key: str) -> Values:
    return _experts(header, key, "qwen3_moe", normalizes=True)


def _olmoe(header: GgufHeader, key: str) -> Values:
    clip = header.number(f"{key}attention.clamp_kqv", 0.0)
    return {**_experts(header, key, "olmoe", normalizes=False), "clip_qkv": clip}


ARCHITECTURES: dict[str, Callable[[GgufHeader, str], Values]] = {
    "llama": _llama,
    "qwen2": _dense("qwen2"),
    "qwen3": _dense("qwen3"),
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "olmoe": _olmoe,
}
