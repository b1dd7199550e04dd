"""Telling the kind of a model directory, and building the model of any kind as it is."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint import build_model, check_directory, load_model
from engine.checkpoint_gguf import GgufSource, open_gguf
from engine.checkpoint_hf import HuggingFaceSource, is_huggingface, open_huggingface
from engine.checkpoint_ranks import find_iteration
from engine.checkpoint_writer import CONFIG
from engine.config import ModelConfig
from engine.errors import CheckpointError
from engine.model.transformer import Transformer
from engine.model_paths import find_gguf
from engine.progress import OnBytes, ignore_bytes


def detect_kind(path: Path) -> str:
    """Tell the kind of a model: 'native', 'cpm', 'huggingface' or 'gguf' (a file, or one inside).

    'cpm' are rank files of CPM-1 or CPM-2; which of them, only their tensors tell.

    Raises CheckpointError if it is of none of them.
    """
    if find_gguf(path) is not None:
        return "gguf"
    check_directory(path)
    if find_iteration(path) is not None:
        return "cpm"
    if is_huggingface(path):
        return "huggingface"
    if (path / CONFIG).exists():
        return "native"
    raise CheckpointError(
        f"{path}: holds no model; expected config.json (native, Hugging Face), a GGUF file or the "
        "latest_checkpointed_iteration.txt of CPM-1 or CPM-2"
    )


def open_foreign(path: Path, *, allow_pickles: bool = False) -> HuggingFaceSource | GgufSource:
    """Open a Hugging Face directory, or a GGUF file, whichever a path means.

    Raises CheckpointError as those that open them do.
    """
    file = find_gguf(path)
    return open_gguf(file) if file else open_huggingface(path, allow_pickles=allow_pickles)


def load_any(
    path: Path,
    dtype: torch.dtype | None = None,
    on_bytes: OnBytes = ignore_bytes,
    config: ModelConfig | None = None,
) -> Transformer:
    """Build the model of a directory of any kind, as it is; dtype None keeps the stored one.

    `config` is the model's own, maybe for longer texts; see `lengthen`.
    Raises CheckpointError if its weights are pickles, which only a conversion reads.
    """
    kind = detect_kind(path)
    if kind == "cpm":
        raise CheckpointError(f"{path}: holds pickles; run `infmoe convert` on it first")
    if kind == "native":
        return load_model(path, dtype, on_bytes=on_bytes, config=config)
    source = open_foreign(path)
    dtype = dtype or source.dtype
    dense = _told(source.dense(), on_bytes)
    return build_model(str(path), config or source.config, dtype, dense, source.experts)


def _told(dense: Iterable[tuple[str, Tensor]], on_bytes: OnBytes) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in dense:
        on_bytes(tensor.nbytes)
        yield name, tensor
