"""Upcycling a model on the disk expert by expert: the mixture may be larger than memory."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import NativeSource, open_native
from engine.checkpoint_any import detect_kind, open_foreign
from engine.checkpoint_gguf import GgufSource
from engine.checkpoint_hf import HuggingFaceSource
from engine.checkpoint_writer import NativeWriter, dense_shapes, open_writer
from engine.errors import CheckpointError
from training.growth import STACKS, Growth, new_generator, widened
from training.upcycling import feed_forward_prefix, upcycle_layer


def open_model_source(model: Path) -> NativeSource | HuggingFaceSource | GgufSource:
    """Open a native or Hugging Face directory or a GGUF file; no tensor is read.

    Raises CheckpointError if it is damaged or holds pickles.
    """
    kind = detect_kind(model)
    if kind == "cpm":
        raise CheckpointError(f"{model}: holds pickles; run `infmoe convert` on it first")
    return open_native(model) if kind == "native" else open_foreign(model)


def tokenizer_texts(model: Path) -> Mapping[str, str]:
    """Tokenizer files that are not there, but in the model's GGUF file, by name."""
    source = open_model_source(model)
    return source.texts if isinstance(source, GgufSource) else {}


def only_upcycles(growth: Growth) -> bool:
    """Whether experts are all that a growth adds."""
    source, target = growth.source, growth.target
    is_deeper = any(target.num_layers(stack) > source.num_layers(stack) for stack in STACKS)
    is_other = growth.vocabulary is not None or is_deeper or bool(widened(source, target))
    return growth.upcycles and not is_other


def write_upcycled(
    model: Path, growth: Growth, directory: Path, dtype: torch.dtype | None = None
) -> None:
    """Write the mixture that a dense model becomes; dtype None keeps the stored one.

    It is what `grow` makes of the whole state. Memory is needed for the source's feed-forwards and
    one expert.
    Raises CheckpointError if the source is damaged, or the mixture does not fit the disk.
    """
    source = open_model_source(model)
    opened = open_writer(
        directory,
        growth.target,
        dtype or source.dtype,
        source.tokenizer_files,
        texts=tokenizer_texts(model),
    )
    with opened as writer:
        _transfer(str(model), source.dense(), growth, writer)
        writer.finish()


def _transfer(
    where: str, tensors: Iterable[tuple[str, Tensor]], growth: Growth, writer: NativeWriter
) -> None:
    """Write tensors as they come; a layer's experts once its feed-forward is there, in order."""
    layers = growth.target.moe_layers()
    prefixes = tuple(feed_forward_prefix(layer) for layer in layers)
    missing = {name for name in dense_shapes(growth.source) if name.startswith(prefixes)}
    waiting: dict[str, Tensor] = {}
    for name, tensor in tensors:
        if not name.startswith(prefixes):
            writer.write_dense(where, name, tensor)
            continue
        waiting[name] = tensor.clone()  # a mapped file must not stay in memory for its sake
        missing.discard(name)
    if missing:
        raise CheckpointError(f"{where}: {len(missing)} tensors are missing, first {min(missing)}")
    generator = new_generator(growth.plan)
    for layer, prefix in zip(layers, prefixes, strict=True):
        names = [name for name in waiting if name.startswith(prefix)]
        dense = {name: waiting.pop(name).float() for name in names}
        made = upcycle_layer(
            layer, dense, growth.target, growth.plan.experts, generator, torch.float32
        )
        for name, tensor in made.dense.items():
            writer.write_dense(where, name, tensor)
        writer.write_experts(where, layer, made.experts)
