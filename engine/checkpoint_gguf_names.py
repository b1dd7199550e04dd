"""Hugging Face's names of the tensors of a GGUF file, and what of the file they are made of.

Source: llama.cpp's convert_hf_to_gguf.py, which makes such files, read backwards.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint_gguf_header import GgufHeader, Place
from engine.errors import CheckpointError

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
FREQUENCIES = "rope_freqs.weight"  # what Llama 3's scaling divides frequencies by
SHORT_FACTORS, LONG_FACTORS = "rope_factors_short.weight", "rope_factors_long.weight"
VECTORS = (FREQUENCIES, SHORT_FACTORS, LONG_FACTORS)  # which belong to the config
TOP = {
    EMBEDDING: "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output_norm.bias": "model.norm.bias",
    HEAD: "lm_head.weight",
    "output.bias": "lm_head.bias",
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
DEEPSEEK_LAYER = {
    "attn_q_a": "self_attn.q_a_proj",
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_q_b": "self_attn.q_b_proj",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_b": "self_attn.kv_b_proj",
    "ffn_gate_shexp": "mlp.shared_experts.gate_proj",
    "ffn_up_shexp": "mlp.shared_experts.up_proj",
    "ffn_down_shexp": "mlp.shared_experts.down_proj",
}
GPT_OSS_LAYER = {"post_attention_norm": "post_attention_layernorm", "ffn_gate_inp": "mlp.router"}
WHOLE = {  # what ends in neither weight nor bias there
    "attn_sinks": "self_attn.sinks",
    "exp_probs_b": "mlp.gate.e_score_correction_bias",
}
GPT2_TOP = {
    EMBEDDING: "transformer.wte.weight",
    "position_embd.weight": "transformer.wpe.weight",
    "output_norm.weight": "transformer.ln_f.weight",
    "output_norm.bias": "transformer.ln_f.bias",
    HEAD: "lm_head.weight",
}
GPT2_LAYER = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
EXPERTS = {"ffn_gate": "gate_proj", "ffn_up": "up_proj", "ffn_down": "down_proj"}
MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
MIXTRAL_BLOCK = "block_sparse_moe"


def as_it_is(tensor: Tensor) -> Tensor:
    """The tensor itself."""
    return tensor


def put_in_halves(heads: int, rows: Tensor) -> Tensor:
    """Rows that turn together lie side by side, and come half a head apart: 0 1 2 3 as 0 2 1 3."""
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])  # (heads, half, 2, ...)
    return pairs.transpose(1, 2).reshape(rows.shape)


def as_row(vector: Tensor) -> Tensor:
    """A matrix of one row."""
    return vector.unsqueeze(0)


def turned(matrices: Tensor) -> Tensor:
    """Outputs by inputs as inputs by outputs, or the other way."""
    return matrices.mT


def alternate(gates: Tensor, ups: Tensor) -> Tensor:
    """Biases of gates and ups by turns."""
    return torch.stack([gates, ups], -1).flatten(-2)


def alternate_columns(gates: Tensor, ups: Tensor) -> Tensor:
    """Matrices of gates and ups, turned, their columns by turns."""
    return torch.stack([gates, ups], -2).flatten(-3, -2).mT


def joined_heads(keys: Tensor, values: Tensor) -> Tensor:
    """Keys (heads, latent, width) and values (heads, width, latent): the rows of each head."""
    return torch.cat([keys.mT, values], 1).flatten(0, 1)


class Origin(NamedTuple):
    """What a tensor of Hugging Face's is made of: those parts, or only a `row` of each.

    Of tensors that hold all experts, `make` takes single rows as well.
    """

    parts: tuple[str, ...]
    make: Callable[..., Tensor] = as_it_is
    row: int | None = None


class _Half(NamedTuple):
    """A tensor of a layer: blk.3.ffn_up.5.weight is of layer 3, half ffn_up, part 5."""

    name: str
    layer: str
    half: str
    part: str | None
    end: str
    shape: tuple[int, ...]

    def beside(self, half: str) -> str:
        """The name of another one of the layer, with the same end."""
        return f"blk.{self.layer}.{half}.{self.end}"


Values = Mapping[str, object]
Found = Iterator[tuple[str, Origin]]


def hf_names(header: GgufHeader, values: Values) -> dict[str, Origin]:
    """Hugging Face's name of each tensor, and what it is made of.

    Raises CheckpointError if there is a tensor that such a model has not.
    """
    kind = str(values["model_type"])
    top = GPT2_TOP if kind == "gpt2" else TOP
    find = {"gpt2": _gpt2, "gpt_oss": _gpt_oss, "deepseek_v2": _deepseek, "deepseek_v3": _deepseek}
    names: dict[str, Origin] = {}
    for name, place in header.places.items():
        if name in top:
            names[top[name]] = Origin((name,))
            continue
        if name in VECTORS:
            continue
        half = _half(name, place)
        found = dict(find.get(kind, _llama)(header, values, half)) if half else None
        if found is None or not found:
            raise CheckpointError(f"{header.path}: has a tensor {name}, which no {kind} has")
        names |= found
    return names


def _half(name: str, place: Place) -> _Half | None:
    match = BLOCK.fullmatch(name)
    return _Half(name, match[1], match[2], match[3], match[4], place.shape) if match else None


def _llama(header: GgufHeader, values: Values, found: _Half) -> Found:
    """Of Llamas and most of their like; architecture llama has rows that turn side by side."""
    is_mixtral = values["model_type"] in ("mixtral", "phimoe")
    block = MIXTRAL_BLOCK if is_mixtral else "mlp"
    layer, half, end = f"model.layers.{found.layer}", found.half, found.end
    matrix = EXPERTS.get(half.removesuffix("_exps"), "")
    expert = f"{MIXTRAL[matrix] if is_mixtral and matrix else matrix}.{end}"
    if half.endswith("_exps") and matrix:
        _check_rows(header, values, found)
        for row in range(found.shape[0]):
            yield f"{layer}.{block}.experts.{row}.{expert}", Origin((found.name,), row=row)
    elif found.part is not None and matrix:  # files of old have a tensor for each expert
        yield f"{layer}.{block}.experts.{found.part}.{expert}", Origin((found.name,))
    elif half == "ffn_gate_inp":
        yield f"{layer}.{block}.gate.{end}", Origin((found.name,))
    elif half in LAYER:
        make: Callable[..., Tensor] = as_it_is
        heads = {"attn_q": "num_attention_heads", "attn_k": "num_key_value_heads"}
        if half in heads and header.text("general.architecture") == "llama":
            count = values[heads[half]]
            assert isinstance(count, int)
            make = partial(put_in_halves, count)
        elif half == "ffn_gate_inp_shexp" and len(found.shape) == 1:
            make = as_row
        yield f"{layer}.{LAYER[half]}.{end}", Origin((found.name,), make)


def _check_rows(header: GgufHeader, values: Values, found: _Half) -> None:
    """Raise CheckpointError unless a tensor has as many rows as there are experts."""
    told = [values[key] for key in NUM_EXPERTS if key in values]
    if told != [found.shape[0]]:
        raise CheckpointError(
            f"{header.path}: {found.name} is of {found.shape[0]} experts, its metadata tells of "
            f"{told[0] if told else 'none'}"
        )


def _deepseek(header: GgufHeader, values: Values, found: _Half) -> Found:
    """With keys and values of a layer in one tensor, or split as newer files have them."""
    layer, half = f"model.layers.{found.layer}", found.half
    keys, heads = found.beside("attn_k_b"), found.beside("attn_v_b")
    if half in WHOLE:
        yield f"{layer}.{WHOLE[half]}", Origin((found.name,))
    elif half in DEEPSEEK_LAYER:
        yield f"{layer}.{DEEPSEEK_LAYER[half]}.{found.end}", Origin((found.name,))
    elif half in ("attn_k_b", "attn_v_b"):
        if keys in header.places and heads in header.places:
            name = f"{layer}.self_attn.kv_b_proj.{found.end}"
            yield name, Origin((keys, heads), joined_heads)
    else:
        yield from _llama(header, values, found)


def _gpt_oss(header: GgufHeader, values: Values, found: _Half) -> Found:
    """With gates and ups of all experts joined, by turns."""
    layer, half, is_bias = f"model.layers.{found.layer}", found.half, found.end == "bias"
    end = "_bias" if is_bias else ""
    gates, ups = found.beside("ffn_gate_exps"), found.beside("ffn_up_exps")
    if half in WHOLE:
        yield f"{layer}.{WHOLE[half]}", Origin((found.name,))
    elif half in GPT_OSS_LAYER:
        yield f"{layer}.{GPT_OSS_LAYER[half]}.{found.end}", Origin((found.name,))
    elif half == "ffn_down_exps":
        make = as_it_is if is_bias else turned
        yield f"{layer}.mlp.experts.down_proj{end}", Origin((found.name,), make)
    elif half in ("ffn_gate_exps", "ffn_up_exps"):
        if gates in header.places and ups in header.places:
            both = alternate if is_bias else alternate_columns
            yield f"{layer}.mlp.experts.gate_up_proj{end}", Origin((gates, ups), both)
    else:
        yield from _llama(header, values, found)


def _gpt2(_: GgufHeader, __: Values, found: _Half) -> Found:
    """Whose matrices Hugging Face has turned."""
    if found.half in GPT2_LAYER:
        make = turned if len(found.shape) == 2 else as_it_is
        name = f"transformer.h.{found.layer}.{GPT2_LAYER[found.half]}.{found.end}"
        yield name, Origin((found.name,), make)
