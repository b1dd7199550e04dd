"""Writing a native model directory piece by piece: atomic, and resumable after a kill.

Everything goes into DIR.partial, which becomes DIR at the end. Expert files that an earlier run of
the same conversion finished there are kept.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from engine.checkpoint_experts import expert_bytes, expert_layout
from engine.checkpoint_lock import LOCK, lock_directory
from engine.checkpoint_tensors import DTYPE_NAMES, INDEX, Shape, TensorWriter, translated
from engine.config import ModelConfig, TokenizerKind, read_config
from engine.errors import CheckpointError, ConfigError
from engine.model.transformer import Transformer
from engine.units import format_bytes
from offload.errors import StoreError
from offload.layout import BlobLayout, Quantization
from offload.store import create_store, open_store, store_bytes

CONFIG = "config.json"
MANIFEST = "conversion.json"
SHARD_BYTES = 4 << 30
TOKENIZER_FILES = (
    "vocab.txt",
    "spiece.model",
    "chinese_vocab.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
VOCABULARY_FILES: dict[TokenizerKind, str] = {  # which of them the tokenizer itself reads
    "cpm2_zh": "vocab.txt",
    "cpm2_zh_en": "vocab.txt",
    "sentencepiece": "spiece.model",
    "tokenizer_json": "tokenizer.json",
    "cpm1": "chinese_vocab.model",
}
STORE = re.compile(r"experts-(encoder|decoder)-\d+\.safetensors")
OWN_FILES = re.compile(
    r"config\.json|conversion\.(json|lock)|model(-\d{5}-of-\d{5})?\.safetensors|"
    rf"{STORE.pattern}(\.partial)?"
)


def expert_file(layer: str) -> str:
    """Name of the expert store of a layer: 'encoder-0' -> 'experts-encoder-0.safetensors'."""
    return f"experts-{layer}.safetensors"


def dense_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Names and shapes of all that is not an expert, in the order of the model."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {
        key: tuple(tensor.shape) for key, tensor in state.items() if not key.startswith("experts.")
    }


class NativeWriter:
    """Takes dense tensors and experts one at a time; `finish` makes the directory appear.

    Use as a context manager: until it is left, nobody else can write the same directory.
    """

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        dtype: torch.dtype,
        layout: BlobLayout,
        dense: TensorWriter,
        held: ExitStack,
    ) -> None:
        self._directory = directory
        self._partial = partial_path(directory)
        self._config = config
        self._layout = layout
        self._dense = dense
        self._held = held
        self.dtype = dtype

    @property
    def dense_bytes(self) -> int:
        """What all tensors that are no experts take."""
        return sum(map(math.prod, dense_shapes(self._config).values())) * self.dtype.itemsize

    @property
    def layer_bytes(self) -> int:
        """What the experts of one layer take, with the padding between them."""
        return self._config.num_experts * self._layout.blob_bytes

    def write_dense(self, where: str, name: str, tensor: Tensor) -> None:
        """Write a tensor of the Transformer's state; `where` names its origin in errors."""
        self._dense.write(where, name, tensor)

    def has_experts(self, layer: str) -> bool:
        """Whether the experts of a layer are written, by this run or by an earlier one."""
        return (self._partial / expert_file(layer)).exists()

    def write_experts(
        self, where: str, layer: str, experts: Iterable[Mapping[str, Tensor]]
    ) -> None:
        """Write all experts of a layer, drawn one at a time, quantised if the writer is to do so.

        Raises CheckpointError if tensors are missing, unknown or misshapen, or the number is wrong.
        """
        path = self._partial / expert_file(layer)
        config, layout = self._config, self._layout
        expected = config.num_experts
        with translated(path, "written"), create_store(path, layer, layout, expected) as store:
            count = 0
            for tensors in experts:
                if count == expected:
                    raise CheckpointError(f"{where}: {layer} has more than {expected} experts")
                origin, kind = f"{where}: {layer} expert {count}", layout.quantization
                store.write(count, expert_bytes(origin, tensors, config, self.dtype, kind))
                count += 1
                del tensors  # before the next one is drawn
            if count < expected:
                raise CheckpointError(f"{where}: {layer} has {count} experts, expected {expected}")
            store.finish()

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
            (self._directory / LOCK).unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()


def open_writer(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    files: Mapping[str, Path],
    *,
    texts: Mapping[str, str] | None = None,
    source: str | None = None,
    quantization: Quantization = "none",
    shard_bytes: int = SHARD_BYTES,
) -> NativeWriter:
    """Start a native directory, or go on with one that the same conversion left unfinished.

    `files` are copied, and `texts` written, under the names they are given, which must be of
    TOKENIZER_FILES.
    `source` tells where the tensors come from; what DIR.partial holds is kept only if source,
    dtype, quantisation and config are those of the run that left it. None always starts over.
    Raises CheckpointError if DIR holds anything but an older native model, is being written by
    another process, cannot be written or does not fit the disk; ConfigError if experts of these
    sizes cannot be quantised.
    """
    texts = texts or {}
    if unknown := sorted({*files, *texts} - set(TOKENIZER_FILES)):
        raise ValueError(f"{unknown[0]} is no tokenizer file; known: {', '.join(TOKENIZER_FILES)}")
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{directory}: {dtype} cannot be written; use a floating dtype")
    layout = expert_layout(config, dtype, quantization)
    directory = directory.resolve()
    check_replaceable(directory)
    partial = partial_path(directory)
    facts = {
        "source": source,
        "dtype": str(dtype),
        "quantization": quantization,
        "config": config.to_json(),
    }
    with ExitStack() as held:
        with translated(partial, "written"):
            _check_own(partial)
            held.callback(os.close, lock_directory(partial))
            _prepare(partial, json.dumps(facts).encode(), may_resume=source is not None)
            for name, file in files.items():
                shutil.copyfile(file, partial / name)
            for name, text in texts.items():
                (partial / name).write_text(text, encoding="utf-8")
        _drop_foreign_stores(partial, config, layout)
        dense = TensorWriter(partial, dense_shapes(config), dtype, shard_bytes)
        _check_space(partial, dense.file_bytes, config, layout)
        dense.create()
        return NativeWriter(directory, config, dtype, layout, dense, held.pop_all())


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


def _check_own(directory: Path) -> None:
    """Raise CheckpointError if a directory holds what no writer of ours has left there."""
    if not directory.exists():
        return
    if foreign := [path for path in directory.iterdir() if not _is_own(path.name)]:
        raise CheckpointError(f"{foreign[0]}: is in the way and not ours; move it away")


def _prepare(partial: Path, manifest: bytes, *, may_resume: bool) -> None:
    """Leave in DIR.partial what this conversion can go on with, and its manifest."""
    path = partial / MANIFEST
    resumes = may_resume and path.exists() and path.read_bytes() == manifest
    for entry in partial.iterdir():  # dense tensors are written anew, maybe in other shards
        is_kept = resumes and (entry.name == MANIFEST or STORE.fullmatch(entry.name))
        if not is_kept and entry.name != LOCK:
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    if not resumes:
        path.write_bytes(manifest)


def _drop_foreign_stores(partial: Path, config: ModelConfig, layout: BlobLayout) -> None:
    """Delete expert files of an earlier run that are damaged or of another layout."""
    for path in partial.glob("experts-*.safetensors"):
        try:
            with open_store(path) as store:
                fits = store.layout == layout and store.num_experts == config.num_experts
        except StoreError:
            fits = False
        if not fits:
            path.unlink()


def _check_space(partial: Path, dense_bytes: int, config: ModelConfig, layout: BlobLayout) -> None:
    """Raise CheckpointError unless what is still to be written fits the disk."""
    needed = dense_bytes + sum(
        store_bytes(layer, layout, config.num_experts)
        for layer in config.moe_layers()
        if not (partial / expert_file(layer)).exists()
    )
    with translated(partial, "written"):
        free = shutil.disk_usage(partial).free
    if needed > free:
        raise CheckpointError(
            f"{partial}: {needed:,} bytes are needed, {free:,} are free on this disk; free "
            f"{format_bytes(needed - free)} or choose another one"
        )


def remove_model(directory: Path) -> None:
    """Delete what an earlier writer left. Raises CheckpointError if it holds anything else."""
    _check_own(directory)
    if directory.exists():
        shutil.rmtree(directory)


def _put_in_place(partial: Path, directory: Path) -> None:
    """Rename, keeping an older model aside until the new one is in its place."""
    check_replaceable(directory)
    old = replaced_path(directory)
    if directory.exists():
        remove_model(old)
        directory.rename(old)
    partial.rename(directory)
    sync(directory.parent)
    remove_model(old)
