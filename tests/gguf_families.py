"""GGUF files of families that are no Llamas, made as llama.cpp's converter makes them."""

import numpy as np

from tests.gguf_files import llama_metadata, saved_state, to_gguf_tensors, write_gguf

GPT2 = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
GPT2_TOP = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "lm_head": "output",
}
DEEPSEEK = {
    "q_a_proj": "attn_q_a",
    "q_b_proj": "attn_q_b",
    "kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "kv_b_proj": "attn_kv_b",
    "q_a_layernorm": "attn_q_a_norm",
    "kv_a_layernorm": "attn_kv_a_norm",
}


def numbers(state):
    """The tensors as arrays, by name."""
    return {key: tensor.float().numpy() for key, tensor in state.items()}


def gpt2(state, config):
    """GPT-2's tensors, matrices turned, and what its file tells of sizes."""
    tensors = {}
    for key, array in numbers(state).items():
        stem, end = key.rsplit(".", 1)
        if stem in GPT2_TOP:
            tensors[f"{GPT2_TOP[stem]}.{end}"] = array
            continue
        _, _, layer, half = stem.split(".", 3)
        name = f"blk.{layer}.{GPT2[half]}.{end}"
        tensors[name] = array.T if "c_" in half and array.ndim == 2 else array
    sizes = {
        "block_count": config.n_layer,
        "context_length": config.n_positions,
        "embedding_length": config.n_embd,
        "feed_forward_length": 4 * config.n_embd,
        "attention.head_count": config.n_head,
        "attention.layer_norm_epsilon": config.layer_norm_epsilon,
    }
    return tensors, {f"gpt2.{key}": value for key, value in sizes.items()}


def phimoe(state, config):
    """Phi-MoE's tensors: a Mixtral's, with biases and what frequencies are divided by."""
    rope = config.rope_parameters
    tensors = to_gguf_tensors(state, None)
    sizes = llama_metadata("phimoe", config)
    if rope["rope_type"] == "longrope":
        for name in ("short", "long"):
            array = np.array(rope[f"{name}_factor"], np.float32)
            tensors[f"rope_factors_{name}.weight"] = array
        original = rope["original_max_position_embeddings"]
        sizes["phimoe.rope.scaling.original_context_length"] = original
        sizes["phimoe.rope.scaling.attn_factor"] = rope["short_mscale"]
    return tensors, sizes


def gpt_oss(state, config):
    """gpt-oss's tensors, with gates and ups of experts apart, and sinks."""
    plain, tensors = {}, {}
    for key, tensor in state.items():
        layer = f"blk.{key.split('.')[2]}" if key.startswith("model.layers") else ""
        array = tensor.float().numpy()
        if key.endswith("sinks"):
            tensors[f"{layer}.attn_sinks.weight"] = array
        elif "mlp.router" in key:
            tensors[f"{layer}.ffn_gate_inp.{key.rsplit('.', 1)[1]}"] = array
        elif "post_attention_layernorm" in key:
            tensors[f"{layer}.post_attention_norm.weight"] = array
        elif "mlp.experts" in key:
            is_bias = key.endswith("_bias")
            end = "bias" if is_bias else "weight"
            array = array if is_bias else array.transpose(0, 2, 1)
            if "gate_up" in key:
                tensors[f"{layer}.ffn_gate_exps.{end}"] = array[:, 0::2]
                tensors[f"{layer}.ffn_up_exps.{end}"] = array[:, 1::2]
            else:
                tensors[f"{layer}.ffn_down_exps.{end}"] = array
        else:
            plain[key] = tensor
    rope = config.rope_parameters
    sizes = llama_metadata("gpt-oss", config) | {
        "gpt-oss.attention.sliding_window": config.sliding_window,
        "gpt-oss.expert_feed_forward_length": config.intermediate_size,
        "gpt-oss.rope.scaling.type": "yarn",
        "gpt-oss.rope.scaling.factor": rope["factor"],
        "gpt-oss.rope.scaling.original_context_length": rope["original_max_position_embeddings"],
    }
    return tensors | to_gguf_tensors(plain, None), sizes


def deepseek(state, config, *, splits=True):
    """DeepSeek's tensors; keys and values of the latents apart, as newer files have them."""
    plain, tensors = {}, {}
    heads, width = config.num_attention_heads, config.qk_nope_head_dim
    for key, tensor in state.items():
        parts, array = key.split("."), tensor.float().numpy()
        layer = f"blk.{parts[2]}" if key.startswith("model.layers") else ""
        if "kv_b_proj" in key and splits:
            rows = array.reshape(heads, -1, config.kv_lora_rank)
            tensors[f"{layer}.attn_k_b.weight"] = rows[:, :width].transpose(0, 2, 1)
            tensors[f"{layer}.attn_v_b.weight"] = rows[:, width:]
        elif "e_score_correction_bias" in key:
            tensors[f"{layer}.exp_probs_b.bias"] = array
        elif "shared_experts" in key:
            plain[key.replace("shared_experts", "shared_expert")] = tensor
        elif parts[-2] in DEEPSEEK:
            tensors[f"{layer}.{DEEPSEEK[parts[-2]]}.weight"] = array
        else:
            plain[key] = tensor
    return tensors | to_gguf_tensors(plain, None), deepseek_metadata(config, splits=splits)


def deepseek_metadata(config, *, splits):
    """What files of DeepSeeks tell; with keys and values apart they are said to share one head."""
    turned, plain = config.qk_rope_head_dim, config.qk_nope_head_dim
    is_v3, rope = config.model_type == "deepseek_v3", config.rope_parameters
    sizes = llama_metadata("deepseek2", config)
    both = {"key_length": plain + turned, "value_length": config.v_head_dim}
    own = {f"attention.{name}": size for name, size in both.items()}
    if splits:
        own = {f"{name}_mla": size for name, size in own.items()} | {
            "attention.head_count_kv": 1,
            "attention.key_length": config.kv_lora_rank + turned,
            "attention.value_length": config.kv_lora_rank,
        }
    own |= {
        "attention.kv_lora_rank": config.kv_lora_rank,
        "rope.dimension_count": turned,
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_count": config.n_routed_experts,
        "expert_used_count": config.num_experts_per_tok,
        "expert_feed_forward_length": config.moe_intermediate_size,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": config.routed_scaling_factor,
        "expert_weights_norm": bool(getattr(config, "norm_topk_prob", False)) and is_v3,
        "expert_gating_func": 2 if is_v3 else 1,
    }
    if config.q_lora_rank:
        own["attention.q_lora_rank"] = config.q_lora_rank
    if is_v3:
        own |= {"expert_group_count": config.n_group, "expert_group_used_count": config.topk_group}
    if rope["rope_type"] == "yarn":
        own |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": rope["factor"],
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_log_multiplier": 0.1 * rope["mscale_all_dim"],
        }
    return sizes | {f"deepseek2.{key}": value for key, value in own.items()}


def write_other(directory, architecture, make, oracle, kinds=None, **options):
    """The folder that transformers saves, and the file made of it."""
    oracle.save_pretrained(directory / "folder")
    tensors, sizes = make(saved_state(directory / "folder"), oracle.config, **options)
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.eos_token_id": 2, **sizes}
    if oracle.config.model_type != "gpt2":
        metadata["tokenizer.ggml.padding_token_id"] = 0
    contiguous = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    return write_gguf(directory / "it.gguf", architecture, metadata, contiguous, kinds)
