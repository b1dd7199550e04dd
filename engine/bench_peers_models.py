"""What all contenders of `infmoe bench-peers` read: one dense model, and the same as a mixture.

The dense one comes from a GGUF file of a Llama, and is written in bf16 as a Hugging Face directory.
Of its mixture, a Mixtral, each expert is that model's feed-forward, two of a token, whose gates sum
to 1: it computes what the dense model does, whatever its routers, which are random, choose.
llama.cpp gets the same weights as a GGUF file, and our offloading as a native directory.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from engine.bench_offload import check_space, tell
from engine.bench_peers_gguf import EXPERTS_PER_TOKEN, write_gguf
from engine.checkpoint_gguf import GgufTensors, open_gguf
from engine.checkpoint_gguf_config import hf_config
from engine.checkpoint_gguf_header import GgufHeader
from engine.checkpoint_gguf_names import MIXTRAL, hf_names
from engine.checkpoint_gguf_parts import open_header
from engine.checkpoint_tensors import INDEX
from engine.convert import convert
from engine.units import format_bytes

ROUTER_STD = 0.02
ARCHITECTURES = {"llama": "LlamaForCausalLM", "mixtral": "MixtralForCausalLM"}
FEED_FORWARD = re.compile(r"(model\.layers\.\d+)\.mlp\.(\w+)\.weight")

Tensors = dict[str, Tensor]


class Source(NamedTuple):
    """A dense model in a GGUF file, in Hugging Face's terms, with the files of its tokenizer."""

    header: GgufHeader
    values: Mapping[str, object]
    tensors: GgufTensors
    texts: Mapping[str, str]


class Paths(NamedTuple):
    """Where a model is: for transformers, vLLM and ours, for llama.cpp, and to be offloaded."""

    huggingface: Path
    gguf: Path
    native: Path | None = None


def open_source(path: Path) -> Source:
    """Open the GGUF file of a dense Llama. Raises CheckpointError, or ValueError if it is none."""
    header = open_header(path)
    values = hf_config(header, {})
    if values["model_type"] != "llama":
        raise ValueError(f"{path}: is no dense Llama; only such a one is made a Mixtral of")
    tensors = GgufTensors(header, hf_names(header, values))
    return Source(header, values, tensors, open_gguf(path).texts)


def mixture_values(source: Source, num_experts: int) -> dict[str, object]:
    """The `config.json` of the model with so many experts; 0: of the dense one."""
    values = {**source.values, "dtype": "bfloat16"}
    if num_experts:
        values |= {
            "model_type": "mixtral",
            "num_local_experts": num_experts,
            "num_experts_per_tok": EXPERTS_PER_TOKEN,
            "sliding_window": None,
        }
        del values["attention_bias"]
    return {**values, "architectures": [ARCHITECTURES[str(values["model_type"])]]}


def mixture_tensors(source: Source, num_experts: int, seed: int = 0) -> Iterator[Tensors]:
    """Tensors in bf16 by Hugging Face's names: what is in no layer, then layer by layer."""
    generator = torch.Generator().manual_seed(seed)
    width = source.values["hidden_size"]
    assert isinstance(width, int)
    for names in _by_layer(source.tensors.names()):
        tensors: Tensors = {}
        for name in names:
            tensor, match = source.tensors.tensor(name).bfloat16(), FEED_FORWARD.fullmatch(name)
            if match is None or not num_experts:
                tensors[name] = tensor
                continue
            layer, matrix = match.groups()
            block = f"{layer}.block_sparse_moe"
            for expert in range(num_experts):
                tensors[f"{block}.experts.{expert}.{MIXTRAL[matrix]}.weight"] = tensor.clone()
            if matrix == "gate_proj":
                router = torch.empty(num_experts, width).normal_(0, ROUTER_STD, generator=generator)
                tensors[f"{block}.gate.weight"] = router.bfloat16()
        yield tensors


def _by_layer(names: list[str]) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name in names:
        match = re.match(r"model\.layers\.(\d+)\.", name)
        groups.setdefault(int(match[1]) if match else -1, []).append(name)
    return [groups[number] for number in sorted(groups)]


def write_huggingface(directory: Path, source: Source, num_experts: int) -> None:
    """Write the model as transformers would, a file for each layer."""
    files: dict[str, str] = {}
    for number, tensors in enumerate(mixture_tensors(source, num_experts)):
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, directory / name, {"format": "pt"})
        flush(directory / name)
        files |= dict.fromkeys(tensors, name)
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))
    for name, text in source.texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    values = mixture_values(source, num_experts)
    (directory / "config.json").write_text(json.dumps(values, indent=2))


def flush(path: Path) -> None:
    """Push a file to the disk: only clean pages can be dropped from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def make_models(
    folder: Path, source: Source, num_experts: int, names: list[str]
) -> dict[str, Paths]:
    """Write the models that are to be measured below a folder; those that are there are used.

    `names` are of 'dense' and 'moe'; the mixture is written as a native directory as well.
    Raises ValueError if the folder holds other models, or the disk is too small.
    """
    found = {}
    for name in names:
        count = num_experts if name == "moe" else 0
        paths = Paths(
            folder / name, folder / f"{name}.gguf", folder / f"{name}-native" if count else None
        )
        _make_huggingface(paths.huggingface, source, count)
        if not paths.gguf.exists():
            tell(f"writing {paths.gguf.name}")
            partial = paths.gguf.with_name(f"{paths.gguf.name}.partial")
            write_gguf(partial, source.header, mixture_tensors(source, count), count)
            flush(partial)
            partial.rename(paths.gguf)
        if paths.native is not None and not paths.native.exists():
            tell(f"writing {paths.native.name}")
            convert(paths.huggingface, paths.native)
        found[name] = paths
    return found


def _make_huggingface(directory: Path, source: Source, num_experts: int) -> None:
    if not directory.exists():
        size = mixture_bytes(source, num_experts)
        check_space(directory.parent, size * (3 if num_experts else 2))
        tell(f"writing {directory.name}, {format_bytes(size)}")
        partial = directory.with_name(f"{directory.name}.partial")
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        write_huggingface(partial, source, num_experts)
        partial.rename(directory)
    elif json.loads((directory / "config.json").read_text()) != json.loads(
        json.dumps(mixture_values(source, num_experts))
    ):
        raise ValueError(f"{directory}: is another model than the one to measure; remove it")


def mixture_bytes(source: Source, num_experts: int) -> int:
    """Bytes of the weights in bf16, without routers."""
    sizes = [
        (torch.Size(source.tensors.shape(name)).numel(), FEED_FORWARD.fullmatch(name) is not None)
        for name in source.tensors.names()
    ]
    return sum(2 * size * (max(num_experts, 1) if copied else 1) for size, copied in sizes)
