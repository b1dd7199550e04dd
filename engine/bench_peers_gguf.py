"""A Llama or Mixtral in bf16 as the GGUF file that llama.cpp reads.

Source: llama.cpp's convert_hf_to_gguf.py, for names, the order of rows, and what stays in fp32.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from engine.checkpoint_gguf_header import GgufHeader, load_gguf_package
from engine.checkpoint_gguf_names import LAYER, MIXTRAL, TOP

EXPERT = re.compile(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.\d+\.(w\d)\.weight")
LAYERED = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
STACKS = {
    MIXTRAL["gate_proj"]: "ffn_gate_exps",
    MIXTRAL["up_proj"]: "ffn_up_exps",
    MIXTRAL["down_proj"]: "ffn_down_exps",
}
HALVES = {theirs: name for name, theirs in LAYER.items()} | {
    "block_sparse_moe.gate": "ffn_gate_inp"
}
TOPS = {theirs: name for name, theirs in TOP.items()}
OWN = ("general.architecture", "general.file_type", "general.quantization_version")
MOSTLY_BF16 = 32  # a file type
EXPERTS_PER_TOKEN = 2


class Part(NamedTuple):
    """A tensor of the file: matrices in bf16, vectors and routers in fp32, as llama.cpp asks."""

    name: str
    tensor: Tensor


def write_gguf(
    path: Path, template: GgufHeader, groups: Iterable[Mapping[str, Tensor]], num_experts: int
) -> None:
    """Write tensors by Hugging Face's names, group by group; each layer lies in one group.

    Sizes and tokenizer are those of `template`, the file of the dense model. The sizes of all stand
    before the first, so that all go through a temporary file.
    """
    gguf = load_gguf_package()
    writer = gguf.GGUFWriter(path, "llama", use_temp_file=True)
    for key, value in template.metadata.items():
        if key not in OWN:
            _add_value(writer, key, value)
    writer.add_file_type(MOSTLY_BF16)
    if num_experts:
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(EXPERTS_PER_TOKEN)
    heads = template.integer("llama.attention.head_count")
    turned = {
        "attn_q": heads,
        "attn_k": template.integer("llama.attention.head_count_kv", heads),
    }
    for group in groups:
        for part in gguf_parts(group, turned):
            if part.tensor.dtype == torch.bfloat16:
                raw = part.tensor.contiguous().view(torch.uint8).numpy()
                kind = gguf.GGMLQuantizationType.BF16
                writer.add_tensor(part.name, raw, raw_dtype=kind)
            else:
                writer.add_tensor(part.name, part.tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gguf_parts(tensors: Mapping[str, Tensor], turned: Mapping[str, int]) -> Iterator[Part]:
    """The tensors of a group by llama.cpp's names; `turned` are the heads of q and k.

    Experts are stacked, (E, F, D), in the order in which they come.
    """
    stacks: dict[str, list[Tensor]] = {}
    for key, tensor in tensors.items():
        if key in TOPS:
            yield _part(TOPS[key], tensor)
        elif expert := EXPERT.fullmatch(key):
            stacks.setdefault(f"blk.{expert[1]}.{STACKS[expert[2]]}.weight", []).append(tensor)
        else:
            match = LAYERED.fullmatch(key)
            assert match is not None
            half = HALVES[match[2]]
            if half in turned:
                tensor = interleave(tensor, turned[half])
            yield _part(f"blk.{match[1]}.{half}.{match[3]}", tensor)
    for name, experts in stacks.items():
        yield Part(name, torch.stack(experts))


def _part(name: str, tensor: Tensor) -> Part:
    is_small = tensor.ndim < 2 or ".ffn_gate_inp." in name
    return Part(name, tensor.float() if is_small else tensor)


def interleave(rows: Tensor, heads: int) -> Tensor:
    """Put the two rows of a head that turn together side by side: 0 1 2 3 -> 0 2 1 3."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])  # (heads, 2, half, ...)
    return halves.transpose(1, 2).reshape(rows.shape)


def _add_value(writer: object, key: str, value: object) -> None:
    """Add what the kind of a value asks for."""
    kinds = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    getattr(writer, kinds.get(type(value), "add_array"))(key, value)
