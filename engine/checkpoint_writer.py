"""Writing a native model directory piece by piece: atomic, and resumable after a kill.

Everything goes into DIR.partial, which becomes DIR at the end. Expert files that an earlier run of
the same conversion finished there are kept.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint_tensors import (
    DTYPE_NAMES,
    INDEX,
    Shape,
    TensorWriter,
    check_tensor,
    convert_tensor,
    raw_bytes,
    translated,
)
from engine.config import ModelConfig, TokenizerKind, read_config
from engine.errors import CheckpointError, ConfigError
from engine.model.transformer import Transformer
from offload.errors import StoreError
from offload.layout import BlobLayout, make_layout
from offload.store import create_store, open_store

CONFIG = "config.json"
MANIFEST = "conversion.json"
SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "vocab.txt",
    "spiece.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
VOCABULARY_FILES: dict[TokenizerKind, str] = {  # which of them the tokenizer itself reads
    "cpm2_zh": "vocab.txt",
    "cpm2_zh_en": "vocab.txt",
    "sentencepiece": "spiece.model",
}
OWN_FILES = re.compile(
    r"config\.json|conversion\.json|model(-\d{5}-of-\d{5})?\.safetensors|"
    r"experts-(encoder|decoder)-\d+\.safetensors(\.partial)?"
)


def expert_file(layer: str) -> str:
    """Name of the expert store of a layer: 'encoder-0' -> 'experts-encoder-0.safetensors'."""
    return f"experts-{layer}.safetensors"


def expert_layout(config: ModelConfig, dtype: torch.dtype) -> BlobLayout:
    """How an expert of the model lies in a blob."""
    name = DTYPE_NAMES[dtype]
    return make_layout({key: (name, shape) for key, shape in config.expert_shapes().items()})


def dense_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of all that is not an expert, in the order of the model."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {
        key: tuple(tensor.shape) for key, tensor in state.items() if not key.startswith("experts.")
    }


class NativeWriter:
    """Takes dense tensors and experts one at a time; `finish` makes the directory appear."""

    def __init__(
        self, directory: Path, config: ModelConfig, dtype: torch.dtype, dense: TensorWriter
    ) -> None:
        self._directory = directory
        self._partial = partial_path(directory)
        self._config = config
        self._dtype = dtype
        self._dense = dense

    def write_dense(self, where: str, name: str, tensor: Tensor) -> None:
        """Write a tensor of the Transformer's state; `where` names its origin in errors."""
        self._dense.write(where, name, tensor)

    def has_experts(self, layer: str) -> bool:
        """Whether the experts of a layer are written, by this run or by an earlier one."""
        return (self._partial / expert_file(layer)).exists()

    def write_experts(
        self, where: str, layer: str, experts: Iterable[Mapping[str, Tensor]]
    ) -> None:
        """Write all experts of a layer, drawn one at a time.

        Raises CheckpointError if tensors are missing, unknown or misshapen, or the number is wrong.
        """
        path = self._partial / expert_file(layer)
        layout = expert_layout(self._config, self._dtype)
        expected = self._config.num_experts
        with translated(path, "written"), create_store(path, layer, layout, expected) as store:
            count = 0
            for tensors in experts:
                if count == expected:
                    raise CheckpointError(f"{where}: {layer} has more than {expected} experts")
                converted = self._convert_expert(f"{where}: {layer} expert {count}", tensors)
                store.write(count, {key: raw_bytes(part) for key, part in converted.items()})
                count += 1
                del tensors, converted  # before the next one is drawn
            if count < expected:
                raise CheckpointError(f"{where}: {layer} has {count} experts, expected {expected}")
            store.finish()

    def _convert_expert(self, where: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shapes = self._config.expert_shapes()
        check_expert(where, tensors, shapes)
        return {key: convert_tensor(where, key, tensors[key], self._dtype) for key in shapes}

    def finish(self) -> None:
        """Write the config, push everything to the disk, and rename DIR.partial to DIR.

        Raises CheckpointError if a tensor or a layer has not been written.
        """
        if missing := self._dense.missing():
            raise CheckpointError(
                f"{self._directory}: {len(missing)} tensors are missing, first {missing[0]}; "
                "the source is incomplete"
            )
        for layer in self._config.moe_layers():
            if not self.has_experts(layer):
                raise CheckpointError(f"{self._directory}: the experts of {layer} are missing")
        with translated(self._directory, "written"):
            (self._partial / CONFIG).write_text(self._config.to_json(), encoding="utf-8")
            sync(*self._partial.iterdir(), self._partial)
            _put_in_place(self._partial, self._directory)
            # only now: a run that is killed while hundreds of gigabytes reach the disk can go on
            (self._directory / MANIFEST).unlink()


def open_writer(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    files: Mapping[str, Path],
    *,
    source: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> NativeWriter:
    """Start a native directory, or go on with one that the same conversion left unfinished.

    `files` are copied under the names they are given, which must be of TOKENIZER_FILES.
    `source` tells where the tensors come from; what DIR.partial holds is kept only if source, dtype
    and config are those of the run that left it. None always starts over.
    Raises CheckpointError if DIR holds anything but an older native model, or cannot be written.
    """
    if unknown := sorted(files.keys() - set(TOKENIZER_FILES)):
        raise ValueError(f"{unknown[0]} is no tokenizer file; known: {', '.join(TOKENIZER_FILES)}")
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{directory}: {dtype} cannot be written; use a floating dtype")
    directory = directory.resolve()
    check_replaceable(directory)
    partial = partial_path(directory)
    facts = {"source": source, "dtype": str(dtype), "config": config.to_json()}
    manifest = json.dumps(facts).encode()
    with translated(partial, "written"):
        if not _can_resume(partial, None if source is None else manifest):
            _remove_own(partial)
            partial.mkdir(parents=True)
            (partial / MANIFEST).write_bytes(manifest)
        for stale in partial.glob(
            "model*"
        ):  # dense tensors are written anew, maybe in other shards
            stale.unlink()
        for name, file in files.items():
            shutil.copyfile(file, partial / name)
    _drop_foreign_stores(partial, config, dtype)
    dense = TensorWriter(partial, dense_shapes(config), dtype, shard_bytes)
    dense.create()
    return NativeWriter(directory, config, dtype, dense)


def check_expert(where: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless the tensors are those of one expert."""
    if wrong := sorted(tensors.keys() ^ shapes.keys()):
        state = "missing" if wrong[0] in shapes else "not of this model"
        raise CheckpointError(f"{where}: tensor {wrong[0]} is {state}")
    for key, shape in shapes.items():
        check_tensor(where, key, tensors[key], shape)


def check_replaceable(directory: Path) -> None:
    """Raise CheckpointError unless the directory is absent, empty, or a native model alone."""
    if directory.is_mount():
        raise CheckpointError(
            f"{directory}: is a mount point, which no rename can replace; name a folder in it"
        )
    with translated(directory, "listed"):
        names = sorted(path.name for path in directory.iterdir()) if directory.exists() else []
    if not names:
        return
    try:
        read_config(directory / CONFIG)
    except ConfigError as error:
        raise CheckpointError(
            f"{directory}: is not empty and holds no native model; choose another directory"
        ) from error
    if foreign := [name for name in names if not _is_own(name)]:
        raise CheckpointError(
            f"{directory}: holds {foreign[0]}, which replacing the model would delete; "
            "move it away or choose another directory"
        )


def partial_path(directory: Path) -> Path:
    """Where a directory is while it is being written."""
    return directory.with_name(directory.name + ".partial")


def replaced_path(directory: Path) -> Path:
    """Where an older model is while a new one takes its place."""
    return directory.with_name(directory.name + ".replaced")


def sync(*paths: Path) -> None:
    """Push files to the disk; for a directory, the names in it."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _is_own(name: str) -> bool:
    return name in TOKENIZER_FILES or name == INDEX or OWN_FILES.fullmatch(name) is not None


def _can_resume(partial: Path, manifest: bytes | None) -> bool:
    path = partial / MANIFEST
    return manifest is not None and path.exists() and path.read_bytes() == manifest


def _remove_own(directory: Path) -> None:
    """Delete what an earlier writer left; refuse to delete anything else."""
    if not directory.exists():
        return
    if foreign := [path for path in directory.iterdir() if not _is_own(path.name)]:
        raise CheckpointError(f"{foreign[0]}: is in the way and not ours; move it away")
    shutil.rmtree(directory)


def _drop_foreign_stores(partial: Path, config: ModelConfig, dtype: torch.dtype) -> None:
    """Delete expert files of an earlier run that are damaged or of another layout."""
    layout = expert_layout(config, dtype)
    for path in partial.glob("experts-*.safetensors"):
        try:
            with open_store(path) as store:
                fits = store.layout == layout and store.num_experts == config.num_experts
        except StoreError:
            fits = False
        if not fits:
            path.unlink()


def _put_in_place(partial: Path, directory: Path) -> None:
    """Rename, keeping an older model aside until the new one is in its place."""
    check_replaceable(directory)
    old = replaced_path(directory)
    if directory.exists():
        _remove_own(old)
        directory.rename(old)
    partial.rename(directory)
    sync(directory.parent)
    _remove_own(old)
