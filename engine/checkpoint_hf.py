"""Hugging Face directories of the T5 family: T5 v1.0, v1.1, Flan-T5 and mT5.

Source: T5 (arXiv:1910.10683), mT5 (arXiv:2010.11934); the names are those of transformers 5.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoint import check_directory, find_tokenizer_files
from engine.checkpoint_hf_config import map_config
from engine.checkpoint_tensors import (
    DTYPE_NAMES,
    INDEX,
    SINGLE,
    check_tensor,
    open_tensor_files,
    read_index,
    read_json,
)
from engine.config import ModelConfig, Stack
from engine.errors import CheckpointError, ConfigError
from engine.pickles import load_state

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
SHARED = "shared.weight"
HEAD = "lm_head.weight"
EMBEDDINGS = (SHARED, "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
# early T5 files carry this one; no T5 code ever used it
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


class Tensors(Protocol):
    """Named tensors of open files, read one at a time."""

    @property
    def files(self) -> tuple[Path, ...]: ...
    def names(self) -> list[str]: ...
    def dtype(self, name: str) -> torch.dtype: ...
    def tensor(self, name: str) -> Tensor: ...


class PickledTensors:
    """The tensors of open pickle files."""

    def __init__(self, files: tuple[Path, ...], state: Mapping[str, Tensor]) -> None:
        self.files = files
        self._state = state

    def names(self) -> list[str]:
        """The keys, sorted."""
        return sorted(self._state)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of a tensor."""
        return self._state[name].dtype

    def tensor(self, name: str) -> Tensor:
        """A tensor, which may be mapped from its file."""
        return self._state[name]


class HuggingFaceSource:
    """An open Hugging Face directory, read one tensor at a time."""

    kind = "huggingface"

    def __init__(self, directory: Path, config: ModelConfig, tensors: Tensors) -> None:
        self.directory = directory
        self.config = config
        self._tensors = tensors

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        return self._tensors.dtype(_embedding_key(self._tensors.names()))

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer files that are there, by name."""
        return find_tokenizer_files(self.directory)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        return self._tensors.files

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the model; queries, keys and values come fused."""
        embedding = _embedding_key(self._tensors.names())
        for name, keys in tensor_names(self.config).items():
            parts = [self._tensors.tensor(embedding if key == SHARED else key) for key in keys]
            yield name, parts[0] if len(parts) == 1 else self._fuse(keys, parts)

    def _fuse(self, keys: tuple[str, ...], parts: list[Tensor]) -> Tensor:
        shape = (self.config.num_heads * self.config.d_kv, self.config.d_model)
        for key, part in zip(keys, parts, strict=True):
            check_tensor(str(self.directory), key, part, shape)
        return torch.cat(parts)

    def experts(self, layer: str) -> Iterator[dict[str, Tensor]]:
        """No family that is supported has experts."""
        raise ValueError(f"{self.directory}: a dense model has no {layer}")


def is_huggingface(directory: Path) -> bool:
    """Whether config.json tells a model_type, as transformers writes it."""
    if not (directory / CONFIG).is_file():
        return False
    try:
        return "model_type" in read_json(directory / CONFIG)
    except CheckpointError:
        return False


def open_huggingface(directory: Path, *, allow_pickles: bool = False) -> HuggingFaceSource:
    """Open a directory of a supported model_type; all keys are checked.

    Raises CheckpointError if the family is not supported, tensors are missing or left over, copies
    of the embedding differ, or the weights are pickles and those are not allowed.
    """
    check_directory(directory)
    values = read_json(directory / CONFIG)
    generation = {}
    if (directory / GENERATION_CONFIG).exists():
        generation = read_json(directory / GENERATION_CONFIG)
    values = {**generation, **{key: value for key, value in values.items() if value is not None}}
    try:
        config = map_config(values)
        tensors = _open_tensors(directory, allow_pickles=allow_pickles)
        config = replace(config, tied_embeddings=_is_tied(directory, values, tensors))
    except ConfigError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    _check_names(directory, config, tensors)
    return HuggingFaceSource(directory, config, tensors)


def tensor_names(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Our name of each tensor -> the keys whose tensors, one below the other, make it up."""
    names: dict[str, tuple[str, ...]] = {"embedding.weight": (SHARED,)}
    if not config.tied_embeddings:
        names[HEAD] = (HEAD,)
    stacks: tuple[Stack, ...] = ("encoder", "decoder")
    for stack in stacks:
        names[f"{stack}.norm.weight"] = (f"{stack}.final_layer_norm.weight",)
        first = f"{stack}.block.0.layer.0.SelfAttention"
        names[f"{stack}.relative_bias.weight"] = (f"{first}.relative_attention_bias.weight",)
        for index in range(config.num_layers(stack)):
            ours, theirs = f"{stack}.layers.{index}", f"{stack}.block.{index}.layer"
            last = 1
            names |= _attention_names(f"{ours}.self_attention", f"{theirs}.0", "SelfAttention")
            if stack == "decoder":
                last = 2
                cross = f"{ours}.cross_attention"
                names |= _attention_names(cross, f"{theirs}.1", "EncDecAttention")
            names[f"{ours}.feed_forward.norm.weight"] = (f"{theirs}.{last}.layer_norm.weight",)
            for name in [name for name in config.expert_shapes() if name != "norm"]:
                key = "wi" if name == "wi_0" and not config.gated else name
                full = f"{theirs}.{last}.DenseReluDense.{key}.weight"
                names[f"{ours}.feed_forward.{name}.weight"] = (full,)
    return names


def _attention_names(ours: str, theirs: str, kind: str) -> dict[str, tuple[str, ...]]:
    q, k, v, o = (f"{theirs}.{kind}.{letter}.weight" for letter in "qkvo")
    names = {f"{ours}.norm.weight": (f"{theirs}.layer_norm.weight",), f"{ours}.out.weight": (o,)}
    if kind == "SelfAttention":
        return names | {f"{ours}.qkv.weight": (q, k, v)}
    return names | {f"{ours}.query.weight": (q,), f"{ours}.key_value.weight": (k, v)}


def _is_tied(directory: Path, values: Mapping[str, object], tensors: Tensors) -> bool:
    """The head is tied unless the files hold another one; transformers 5 calls every T5 tied."""
    names = tensors.names()
    if HEAD not in names:
        if values.get("tie_word_embeddings") is False:
            raise CheckpointError(
                f"{directory}: {HEAD} is missing, and the config says not to tie it"
            )
        return True
    if values.get("tie_word_embeddings") is False:
        return False
    return torch.equal(tensors.tensor(HEAD), tensors.tensor(_embedding_key(names)))


def _check_names(directory: Path, config: ModelConfig, tensors: Tensors) -> None:
    """Raise CheckpointError if tensors are missing or left over, or copies of one differ."""
    names = set(tensors.names())
    needed = {key for keys in tensor_names(config).values() for key in keys}
    copies = {*EMBEDDINGS, HEAD} if config.tied_embeddings else set(EMBEDDINGS)
    if names & copies:  # any one of them serves
        needed -= {SHARED}
    if missing := sorted(needed - names):
        raise CheckpointError(f"{directory}: {len(missing)} tensors missing, first {missing[0]}")
    if unknown := sorted(names - needed - {*EMBEDDINGS, HEAD, UNUSED}):
        family = "gated" if config.gated else "ungated"
        raise CheckpointError(f"{directory}: a {family} T5 has no tensor {unknown[0]}")
    first = _embedding_key(names)
    for key in EMBEDDINGS:
        if key in names - {first} and not torch.equal(tensors.tensor(key), tensors.tensor(first)):
            raise CheckpointError(f"{directory}: {key} differs from {first}; they must be equal")


def _embedding_key(names: set[str] | list[str]) -> str:
    """The key that stores the embedding; writers that drop copies keep any one of them."""
    return next((key for key in (*EMBEDDINGS, HEAD) if key in names), SHARED)


def _open_tensors(directory: Path, *, allow_pickles: bool) -> Tensors:
    if (directory / SINGLE).exists() or (directory / INDEX).exists():
        return open_tensor_files(directory)
    single, index = directory / PICKLE, directory / PICKLE_INDEX
    if not single.exists() and not index.exists():
        raise CheckpointError(f"{directory}: has no weights; expected {SINGLE} or {INDEX}")
    if not allow_pickles:
        raise CheckpointError(
            f"{directory}: has its weights as pickles only; run `infmoe convert` on it first"
        )
    files = sorted(set(read_index(index).values())) if index.exists() else [single]
    state: dict[str, Tensor] = {}
    for path in files:
        state |= load_state(path)
    if other := sorted(key for key, tensor in state.items() if tensor.dtype not in DTYPE_NAMES):
        raise CheckpointError(
            f"{directory}: {other[0]} is {state[other[0]].dtype}, expected floats"
        )
    return PickledTensors(tuple(files), state)
