"""Opening a model of any kind, converting it to native, telling what is in it."""

import json
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from engine.checkpoint import NativeSource, open_native
from engine.checkpoint_any import detect_kind, open_foreign
from engine.checkpoint_any import load_any as load_any  # most users of this module want it too
from engine.checkpoint_cpm1 import open_ranks
from engine.checkpoint_cpm2 import Cpm2Source
from engine.checkpoint_gguf import GgufSource
from engine.checkpoint_stamp import stamp_file
from engine.checkpoint_writer import (
    VOCABULARY_FILES,
    NativeWriter,
    dense_shapes,
    open_writer,
    partial_path,
    replaced_path,
)
from engine.config import ModelConfig
from engine.errors import CheckpointError
from offload.layout import Quantization

logger = logging.getLogger(__name__)


class Source(Protocol):
    """An open checkpoint of any kind, read one tensor or one expert at a time."""

    @property
    def kind(self) -> str:
        """'native', 'cpm1', 'cpm2', 'huggingface' or 'gguf'."""
        ...

    @property
    def config(self) -> ModelConfig:
        """Sizes and variants of the model."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the tensors are stored."""
        ...

    @property
    def tokenizer_files(self) -> Mapping[str, Path]:
        """The tokenizer files that are there, by the names they take in a native directory."""
        ...

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        ...

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the Transformer's state but those of experts."""
        ...

    def experts(self, layer: str) -> Iterator[Mapping[str, Tensor]]:
        """The experts of a MoE layer, in order; each is valid until the next is drawn."""
        ...


class Progress(NamedTuple):
    """How far a conversion is. Bytes are those of the result; the item was just finished."""

    item: str
    done_bytes: int
    total_bytes: int


def open_source(path: Path, vocab: Path | None = None) -> Source:
    """Open a model directory, whatever its kind; pickles are read, restricted.

    `vocab` is the vocab.txt of a CPM-2 checkpoint, or the chinese_vocab.model of a CPM-1, that has
    none beside it.
    Raises CheckpointError if the directory is of no known kind, damaged or incomplete.
    """
    kind = detect_kind(path)
    if vocab is not None and kind != "cpm":
        raise CheckpointError(f"{path}: has no rank files of CPM; a vocabulary is not needed")
    if kind == "cpm":
        return open_ranks(path, vocab)
    if kind != "native":
        return open_foreign(path, allow_pickles=True)
    return open_native(path)


def convert(
    src: Path,
    dst: Path,
    dtype: torch.dtype | None = None,
    progress: Callable[[Progress], None] | None = None,
    vocab: Path | None = None,
    quantization: Quantization = "none",
) -> None:
    """Write the model of a directory of any kind as a native directory; dtype None keeps its own.

    Memory is needed for one tensor, or one expert. A conversion that was killed goes on after the
    last layer of experts that it finished, if the files of the source have not changed.
    Raises CheckpointError if the source is damaged, or `dst` is taken, cannot be written or does
    not fit the disk; ConfigError if experts of these sizes cannot be quantised.
    """
    source = open_source(src, vocab)
    dtype = dtype or source.dtype
    target = dst.resolve()
    if src.resolve() in (target, partial_path(target), replaced_path(target)):
        raise CheckpointError(
            f"{dst}: is the source itself, or would overwrite it; choose another directory"
        )
    needed = VOCABULARY_FILES.get(source.config.tokenizer)
    if source.kind in ("cpm1", "cpm2") and needed not in source.tokenizer_files:
        raise CheckpointError(f"{src}: {needed} is missing; put it there, or name it")
    files = source.tokenizer_files
    identity = identify(src, source, files.values())
    texts = source.texts if isinstance(source, GgufSource) else {}
    opened = open_writer(
        dst,
        source.config,
        dtype,
        files,
        texts=texts,
        source=identity,
        quantization=quantization,
    )
    with opened as writer:
        for warning in _losses(source, {*files, *texts}, quantization):
            logger.warning("%s: %s", src, warning)
        for item in transfer(source, str(src), writer):
            if progress is not None:
                progress(item)
        check_unchanged(src, identity, identify(src, source, files.values()))
        writer.finish()


def _losses(source: Source, files: set[str], quantization: Quantization) -> Iterator[str]:
    """What the result of a conversion lacks."""
    needed = VOCABULARY_FILES.get(source.config.tokenizer)
    if needed is not None and needed not in files:
        yield f"has no tokenizer files: without {needed} the result takes ids only"
    if isinstance(source, Cpm2Source) and source.prompt() is not None:
        yield "the soft prompt stored with the model is left out"
    stored = source.expert_layout() if isinstance(source, NativeSource) else None
    if quantization != "none" and stored is not None and stored.quantization != "none":
        yield "experts are quantised already; errors add up: convert the original instead"


def transfer(source: Source, where: str, writer: NativeWriter) -> Iterator[Progress]:
    """Write everything, telling after each tensor and each layer of experts how far it is."""
    layers = source.config.moe_layers()
    total = writer.dense_bytes + writer.layer_bytes * len(layers)
    done = 0
    for name, tensor in source.dense():
        writer.write_dense(where, name, tensor)
        done += tensor.numel() * writer.dtype.itemsize
        yield Progress(name, done, total)
    for layer in layers:
        if not writer.has_experts(layer):
            writer.write_experts(where, layer, source.experts(layer))
        done += writer.layer_bytes
        yield Progress(f"experts of {layer}", done, total)


def inspect(path: Path, vocab: Path | None = None) -> dict[str, object]:
    """Tell what a model directory holds, in JSON's types. Sizes in bytes, parameters in numbers.

    Raises CheckpointError if it is of no known kind, damaged or incomplete.
    """
    source = open_source(path, vocab)
    sizes = {file: file.stat().st_size for file in source.files}
    layout = source.expert_layout() if isinstance(source, NativeSource) else None
    experts = (
        {"quantization": layout.quantization, "blob_bytes": layout.blob_bytes} if layout else {}
    )
    return {
        "path": str(path),
        "kind": source.kind,
        "config": json.loads(source.config.to_json()),
        "dtype": str(source.dtype).removeprefix("torch."),
        "experts": experts,
        "parameters": count_parameters(source.config),
        "files": [
            {"name": file.name if path.is_file() else str(file.relative_to(path)), "bytes": size}
            for file, size in sizes.items()
        ],
        "bytes": sum(sizes.values()),
        "tokenizer_files": sorted(source.tokenizer_files),
    }


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Number of parameters: in all, of experts, of one expert, and that one token meets.

    The router's norm, a copy of an expert's, does not count.
    """
    shapes = dense_shapes(config)
    dense = sum(
        math.prod(shape) for name, shape in shapes.items() if not name.endswith(".router_norm")
    )
    one = _expert_parameters(config)
    num_layers = len(config.moe_layers())
    experts = one * config.num_experts * num_layers
    return {
        "total": dense + experts,
        "dense": dense,
        "experts": experts,
        "one_expert": one if num_layers else 0,
        "active": dense + one * num_layers * config.num_experts_per_token,
    }


def _expert_parameters(config: ModelConfig) -> int:
    return sum(map(math.prod, config.expert_shapes().values()))


def identify(src: Path, source: Source, beside: Iterable[Path] = ()) -> str:
    """What a model and its files are, and files `beside` them: see `stamp_file`.

    Unchanged, a killed conversion can go on. Raises CheckpointError if a file cannot be read.
    """
    stamps = [stamp_file(file) for file in (*source.files, *beside)]
    return json.dumps([str(src.resolve()), asdict(source.config), stamps])


def check_unchanged(src: Path, before: str, after: str) -> None:
    """Raise CheckpointError if a model is not what it was: parts of two may have been written."""
    if before != after:
        raise CheckpointError(
            f"{src}: its files changed while they were read; run it again when they are all there"
        )
