"""GGUF files of tiny models, made of Hugging Face's the way llama.cpp's converter makes them."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer

F32 = gguf.GGMLQuantizationType.F32
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
HALVES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
EXPERT = re.compile(r"model\.layers\.(\d+)\.\w+\.experts\.(\d+)\.(\w+)\.weight")
EXPERTS = {
    "gate_proj": "ffn_gate_exps",
    "w1": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "w3": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w2": "ffn_down_exps",
}


def interleave(rows: np.ndarray, heads: int) -> np.ndarray:
    """Put the two rows of a head that turn together side by side, as files of Llamas have them."""
    half = rows.shape[0] // heads // 2
    out = np.empty_like(rows)
    for head in range(heads):
        start = head * 2 * half
        out[start : start + 2 * half : 2] = rows[start : start + half]
        out[start + 1 : start + 2 * half : 2] = rows[start + half : start + 2 * half]
    return out


def to_gguf_tensors(
    state: Mapping[str, torch.Tensor], heads: Mapping[str, int] | None
) -> dict[str, np.ndarray]:
    """Tensors by the names of GGUF; `heads` of q_proj and k_proj where pairs are interleaved."""
    tensors: dict[str, np.ndarray] = {}
    experts: dict[str, list[np.ndarray]] = {}
    for key, tensor in sorted(state.items(), key=_by_numbers):
        array = tensor.float().numpy()
        if match := EXPERT.fullmatch(key):
            name = f"blk.{match[1]}.{EXPERTS[match[3]]}.weight"
            experts.setdefault(name, []).append(array)
            continue
        stem, end = key.rsplit(".", 1)
        if stem in NAMES:
            tensors[f"{NAMES[stem]}.{end}"] = array
            continue
        _, _, layer, half = stem.split(".", 3)
        if heads and half.endswith(tuple(heads)):
            array = interleave(array, heads[half.rsplit(".", 1)[1]])
        if half == "mlp.shared_expert_gate":
            array = array[0]
        tensors[f"blk.{layer}.{HALVES[half]}.{end}"] = array
    return tensors | {name: np.stack(rows) for name, rows in experts.items()}


def _by_numbers(item: tuple[str, torch.Tensor]) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", item[0])]


def llama_metadata(architecture: str, config: object) -> dict[str, object]:
    """What files of Llamas and the like tell of sizes, by transformers' config."""
    values = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "vocab_size": config.vocab_size,
    }
    if head_dim := getattr(config, "head_dim", None):
        values |= {"attention.key_length": head_dim, "attention.value_length": head_dim}
    if clip := getattr(config, "clip_qkv", None):
        values["attention.clamp_kqv"] = clip
    for name in ("num_experts", "num_local_experts"):
        if count := getattr(config, name, 0):
            values |= {"expert_count": count, "expert_used_count": config.num_experts_per_tok}
    if width := getattr(config, "moe_intermediate_size", 0):
        values["expert_feed_forward_length"] = width
    if width := getattr(config, "shared_expert_intermediate_size", 0):
        values["expert_shared_feed_forward_length"] = width
    return {f"{architecture}.{key}": value for key, value in values.items()}


def byte_level_metadata(tokenizer: Tokenizer, pre: str) -> dict[str, object]:
    """What files tell of a byte-level tokenizer."""
    vocab = tokenizer.get_vocab()
    special = {i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = sorted(vocab, key=vocab.__getitem__)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if i in special else 1 for i in range(len(tokens))],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
    }


def sentencepiece_metadata(tokenizer: Tokenizer) -> dict[str, object]:
    """What files tell of a SentencePiece tokenizer: scores instead of merges."""
    vocab = tokenizer.get_vocab()
    tokens = sorted(vocab, key=vocab.__getitem__)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    rank: dict[str, int] = {}
    for index, (left, right) in enumerate(merges):
        rank.setdefault(left + right, index)
    kinds = [2, 3, 3, *[6] * 256] + [1] * (len(tokens) - 259)
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [float(-rank.get(token, len(merges))) for token in tokens],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, object],
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, gguf.GGMLQuantizationType] | None = None,
    tensors_to_a_part: int = 0,
) -> Path:
    """Write a file; `kinds` are the formats of tensors, fp32 for the rest.

    With `tensors_to_a_part` it is split, and its first part is what comes back.
    """
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=tensors_to_a_part)
    for key, value in metadata.items():
        add_value(writer, key, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name, F32)
        writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if tensors_to_a_part:
        return min(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))
    return path


def add_value(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    """Add what the kind of a value asks for."""
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case Sequence():
            writer.add_array(key, value)


def saved_state(directory: Path) -> dict[str, torch.Tensor]:
    """The tensors that transformers saved, by the names on the disk."""
    return load_file(directory / "model.safetensors")
