"""What the head of a GGUF file tells of a model, as the config.json that Hugging Face would have.

Source: llama.cpp's convert_hf_to_gguf.py, which makes such files, read backwards.
"""

from collections.abc import Callable, Mapping

import numpy as np

from engine.checkpoint_gguf_header import GgufHeader
from engine.checkpoint_gguf_names import (
    EMBEDDING,
    FREQUENCIES,
    HEAD,
    LONG_FACTORS,
    SHORT_FACTORS,
)
from engine.errors import CheckpointError

END_KEYS = ("eos", "eot", "eom")  # of a text, of a turn, of a message
SIGMOID = 2  # the number of a way to weigh experts
LOG_SHARE = 0.1  # of the logarithm of a stretch, by which YaRN makes dot products larger

Values = dict[str, object]
Vectors = Mapping[str, list[float]]


def hf_config(header: GgufHeader, vectors: Vectors) -> Values:
    """The config.json of the model; `vectors` are the contents of those of VECTORS that are there.

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
    key = f"{architecture}."
    values: Values = {
        "vocab_size": header.places[EMBEDDING].shape[0],
        "tie_word_embeddings": HEAD not in header.places,
        **_special_ids(header),
    }
    if architecture != "gpt2":
        values |= _llama_sizes(header, key)
        values["rope_scaling"] = _scaling(header, key, vectors)
    return {**values, **ARCHITECTURES[architecture](header, key)}


def _llama_sizes(header: GgufHeader, key: str) -> Values:
    """What Llamas and their like have in common."""
    num_heads = header.integer(key + "attention.head_count")
    width = header.places[EMBEDDING].shape[1]
    rotary = header.integer(key + "rope.dimension_count", width // max(num_heads, 1))
    return {
        "hidden_act": "silu",
        "hidden_size": header.integer(key + "embedding_length"),
        "num_hidden_layers": header.integer(key + "block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": header.integer(key + "attention.head_count_kv", 0) or num_heads,
        "head_dim": header.integer(key + "attention.key_length", rotary),
        "intermediate_size": header.integer(key + "feed_forward_length", 0),
        "max_position_embeddings": header.integer(key + "context_length"),
        "rms_norm_eps": header.number(key + "attention.layer_norm_rms_epsilon"),
        "rope_theta": header.number(key + "rope.freq_base", 10000.0),
    }


def _special_ids(header: GgufHeader) -> Values:
    """The ids of the end of a text or of a turn, and of padding, where there are any."""
    keys = [f"tokenizer.ggml.{name}_token_id" for name in END_KEYS]
    ends = [header.integer(key) for key in keys if key in header.metadata]
    values: Values = {"eos_token_id": list(dict.fromkeys(ends))}
    if "tokenizer.ggml.padding_token_id" in header.metadata:
        values["pad_token_id"] = header.integer("tokenizer.ggml.padding_token_id")
    return values


def _scaling(header: GgufHeader, key: str, vectors: Vectors) -> Values | None:
    """How rotary positions are stretched."""
    scaling, original = key + "rope.scaling.", key + "rope.scaling.original_context_length"
    if FREQUENCIES in vectors:  # worked out already: what each frequency is divided by
        return {
            "rope_type": "longrope",
            "short_factor": vectors[FREQUENCIES],
            "long_factor": vectors[FREQUENCIES],
            "attention_factor": 1.0,
            "original_max_position_embeddings": header.integer(key + "context_length"),
        }
    if SHORT_FACTORS in vectors and LONG_FACTORS in vectors:
        told = scaling + "attn_factor"
        return {
            "rope_type": "longrope",
            "short_factor": vectors[SHORT_FACTORS],
            "long_factor": vectors[LONG_FACTORS],
            "attention_factor": _decimal(header, told) if told in header.metadata else None,
            "original_max_position_embeddings": header.integer(original),
        }
    kind = header.text(scaling + "type", "none")
    if kind == "none":
        return None
    values: Values = {"rope_type": kind, "factor": header.number(scaling + "factor")}
    if kind == "yarn":
        values["original_max_position_embeddings"] = header.integer(original)
        for name in ("beta_fast", "beta_slow"):
            if scaling + f"yarn_{name}" in header.metadata:
                values[name] = header.number(scaling + f"yarn_{name}")
    return values


def _decimal(header: GgufHeader, key: str) -> float:
    """A number as it was before it was stored in fp32: the shortest that is rounded to that."""
    return float(str(np.float32(header.number(key))))


def _epsilon(header: GgufHeader, key: str) -> Values:
    return {"rms_norm_eps": _decimal(header, key + "attention.layer_norm_rms_epsilon")}


def _llama(header: GgufHeader, key: str) -> Values:
    """Llama, Mistral, SmolLM, or with experts Mixtral, which share an architecture there."""
    bias = "blk.0.attn_q.bias" in header.places
    if f"{key}expert_count" not in header.metadata:
        return {"model_type": "llama", "attention_bias": bias}
    return {"model_type": "mixtral", **_local_experts(header, key)}


def _local_experts(header: GgufHeader, key: str) -> Values:
    return {
        "num_local_experts": header.integer(f"{key}expert_count"),
        "num_experts_per_tok": header.integer(f"{key}expert_used_count"),
    }


def _dense(model_type: str) -> Callable[[GgufHeader, str], Values]:
    return lambda _, __: {"model_type": model_type}


def _experts(header: GgufHeader, key: str, model_type: str, *, normalizes: bool) -> Values:
    return {
        "model_type": model_type,
        "num_experts": header.integer(f"{key}expert_count"),
        "num_experts_per_tok": header.integer(f"{key}expert_used_count"),
        "moe_intermediate_size": _expert_width(header, key),
        "norm_topk_prob": normalizes,
    }


def _expert_width(header: GgufHeader, key: str) -> int:
    gates = header.places.get("blk.0.ffn_gate_exps.weight")
    width = gates.shape[1] if gates else None
    return header.integer(f"{key}expert_feed_forward_length", width)


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


def _gpt2(header: GgufHeader, key: str) -> Values:
    width = header.integer(key + "embedding_length")
    return {
        "model_type": "gpt2",
        "activation_function": "gelu_new",
        "n_embd": width,
        "n_head": header.integer(key + "attention.head_count"),
        "n_layer": header.integer(key + "block_count"),
        "n_inner": header.integer(key + "feed_forward_length", 4 * width),
        "n_positions": header.integer(key + "context_length"),
        "layer_norm_epsilon": _decimal(header, key + "attention.layer_norm_epsilon"),
    }


def _phimoe(header: GgufHeader, key: str) -> Values:
    return {
        "model_type": "phimoe",
        "attention_bias": "blk.0.attn_q.bias" in header.places,
        "lm_head_bias": "output.bias" in header.places,
        "sliding_window": header.integer(key + "attention.sliding_window", 0) or None,
        **_local_experts(header, key),
        **_epsilon(header, key),
    }


def _gpt_oss(header: GgufHeader, key: str) -> Values:
    values = {
        "model_type": "gpt_oss",
        "attention_bias": "blk.0.attn_q.bias" in header.places,
        "sliding_window": header.integer(key + "attention.sliding_window"),
        "intermediate_size": _expert_width(header, key),
        **_local_experts(header, key),
        **_epsilon(header, key),
    }
    scaling = _scaling(header, key, {})
    if scaling is not None:  # gpt-oss lets YaRN's ramp begin between two frequencies
        values["rope_scaling"] = {**scaling, "truncate": False}
    return values


def _deepseek(header: GgufHeader, key: str) -> Values:
    """DeepSeek-V2, or V3 where experts are weighed by sigmoids; newer files have keys of MLA."""
    is_v3 = header.integer(key + "expert_gating_func", 0) == SIGMOID
    plain = key + "attention.key_length"
    values = key + "attention.value_length"
    suffix = "_mla" if f"{plain}_mla" in header.metadata else ""
    turned = header.integer(key + "rope.dimension_count")
    groups = header.integer(key + "expert_group_count", 1)
    told: Values = {
        "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
        "num_key_value_heads": header.integer(key + "attention.head_count"),
        "q_lora_rank": header.integer(key + "attention.q_lora_rank", 0),
        "kv_lora_rank": header.integer(key + "attention.kv_lora_rank"),
        "qk_rope_head_dim": turned,
        "qk_nope_head_dim": header.integer(plain + suffix) - turned,
        "v_head_dim": header.integer(values + suffix),
        "n_routed_experts": header.integer(key + "expert_count"),
        "num_experts_per_tok": header.integer(key + "expert_used_count"),
        "n_shared_experts": header.integer(key + "expert_shared_count", 0),
        "moe_intermediate_size": header.integer(key + "expert_feed_forward_length"),
        "first_k_dense_replace": header.integer(key + "leading_dense_block_count", 0),
        "routed_scaling_factor": _scale(header, key),
        "norm_topk_prob": bool(header.metadata.get(key + "expert_weights_norm", False)),
        "n_group": groups,
        "topk_group": header.integer(key + "expert_group_used_count", groups),
        "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
        **_epsilon(header, key),
    }
    if is_v3:
        told["topk_method"] = "noaux_tc"
    return {**told, **_deepseek_scaling(header, key)}


def _scale(header: GgufHeader, key: str) -> float:
    """What the chosen gates are multiplied by; 0 stands for 1, as llama.cpp has it."""
    name = key + "expert_weights_scale"
    return (_decimal(header, name) if name in header.metadata else 0.0) or 1.0


def _deepseek_scaling(header: GgufHeader, key: str) -> Values:
    """YaRN with the share of its logarithm by which dot products become larger."""
    scaling, name = _scaling(header, key, {}), key + "rope.scaling.yarn_log_multiplier"
    if scaling is None or name not in header.metadata:
        return {}
    share = round(_decimal(header, name) / LOG_SHARE, 6)
    return {"rope_scaling": {**scaling, "mscale": share, "mscale_all_dim": share}}


ARCHITECTURES: dict[str, Callable[[GgufHeader, str], Values]] = {
    "llama": _llama,
    "qwen2": _dense("qwen2"),
    "qwen3": _dense("qwen3"),
    "qwen2moe": _qwen2_moe,
    "qwen3moe": _qwen3_moe,
    "olmoe": _olmoe,
    "gpt2": _gpt2,
    "phimoe": _phimoe,
    "gpt-oss": _gpt_oss,
    "deepseek2": _deepseek,
}
