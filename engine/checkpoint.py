"""Native model directories: config.json, model.safetensors, one expert store per MoE layer."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint_experts import check_expert, check_store, float_tensors
from engine.checkpoint_tensors import (
    Shape,
    TensorFiles,
    check_tensor,
    convert_tensor,
    open_tensor_files,
    stored_dtype,
    translated,
)
from engine.checkpoint_writer import (
    CONFIG,
    SHARD_BYTES,
    TOKENIZER_FILES,
    dense_shapes,
    expert_file,
    open_writer,
    partial_path,
    replaced_path,
)
from engine.config import ModelConfig, read_config
from engine.errors import CheckpointError, ConfigError
from engine.model.moe import ExpertSource
from engine.model.transformer import Transformer
from engine.progress import OnBytes, ignore_bytes
from offload.layout import BlobLayout
from offload.store import ExpertStore, open_store

Dense = Iterable[tuple[str, Tensor]]
ReadExperts = Callable[[str], Iterable[Mapping[str, Tensor]]]


class NativeSource:
    """An open native directory, read one tensor or one expert at a time."""

    kind = "native"

    def __init__(
        self,
        directory: Path,
        config: ModelConfig,
        tensors: TensorFiles,
        on_bytes: OnBytes = ignore_bytes,
    ) -> None:
        self.directory = directory
        self.config = config
        self._tensors = tensors
        self._on_bytes = on_bytes

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding, and so of all tensors."""
        return self._tensors.dtype("embedding.weight")

    @property
    def tokenizer_files(self) -> dict[str, Path]:
        """The tokenizer files that are there, by name."""
        return find_tokenizer_files(self.directory)

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold tensors."""
        layers = self.config.moe_layers()
        return *self._tensors.files, *(self.directory / expert_file(layer) for layer in layers)

    def dense(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of all that is not an expert."""
        for name in self._tensors.names():
            tensor = self._tensors.tensor(name)
            self._on_bytes(tensor.nbytes)
            yield name, tensor

    def expert_layout(self) -> BlobLayout | None:
        """How an expert lies in a blob of the first layer; None if the model is dense."""
        for layer in self.config.moe_layers()[:1]:
            with _open_layer(self.directory / expert_file(layer), layer, self.config) as store:
                return store.layout
        return None

    def experts(self, layer: str) -> Iterator[dict[str, Tensor]]:
        """The experts of a layer in order; the tensors of one are valid until the next is drawn.

        Quantised ones are dequantised.
        """
        path = self.directory / expert_file(layer)
        with translated(path, "read"), _open_layer(path, layer, self.config) as store:
            blob = np.empty(store.layout.blob_bytes, np.uint8)
            for expert in range(store.num_experts):
                read = store.read_blob(expert, blob)
                self._on_bytes(store.layout.blob_bytes)
                yield float_tensors(read, store.layout)


def open_native(directory: Path, on_bytes: OnBytes = ignore_bytes) -> NativeSource:
    """Open a native directory; only headers are read. Raises CheckpointError if it is damaged.

    `on_bytes` is told of each part that is read later on.
    """
    check_directory(directory)
    try:
        config = read_config(directory / CONFIG)
    except ConfigError as error:
        raise CheckpointError(str(error)) from error
    source = NativeSource(directory, config, open_tensor_files(directory), on_bytes)
    if missing := [path for path in source.files if not path.exists()]:
        raise CheckpointError(f"{missing[0]}: is missing; copy or convert the model again")
    return source


def load_model(
    directory: Path,
    dtype: torch.dtype | None = None,
    experts: ExpertSource | None = None,
    on_bytes: OnBytes = ignore_bytes,
    config: ModelConfig | None = None,
) -> Transformer:
    """Build the model of a native directory on the CPU; dtype None keeps the stored one.

    `config` is the model's own, maybe for longer texts.
    With `experts` given (offloaded ones) only the rest is read; else all are held in memory.
    Raises CheckpointError if a tensor is missing, left over, misshapen or damaged.
    """
    source = open_native(directory, on_bytes)
    dtype = dtype or source.dtype
    config = config or source.config
    return build_model(str(directory), config, dtype, source.dense(), source.experts, experts)


def build_model(
    where: str,
    config: ModelConfig,
    dtype: torch.dtype,
    dense: Dense,
    read_experts: ReadExperts,
    experts: ExpertSource | None = None,
) -> Transformer:
    """Build a model from its tensors; `read_experts` is not called if `experts` are given.

    Raises CheckpointError, beginning with `where`, if the tensors are not those of the config.
    """
    with torch.device("meta"):
        model = Transformer(config, experts)
    state = _collect(where, dense_shapes(config), dense, dtype)
    if experts is None:
        for layer in config.moe_layers():
            stacked = _stack(f"{where}: {layer}", config, read_experts(layer), dtype)
            state.update((f"experts.layers.{layer}.{key}", part) for key, part in stacked.items())
    result = model.load_state_dict(state, strict=False, assign=True)
    assert not result.unexpected_keys
    assert experts is not None or not result.missing_keys
    return model


def save_model(
    model: Transformer,
    directory: Path,
    tokenizer_files: Iterable[Path] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Write a model with resident experts as a native directory; dtype None keeps the model's own.

    An older native model in the directory is replaced once the new one is complete.
    """
    save_state(model.config, model.state_dict(), directory, tokenizer_files, dtype)


def save_state(
    config: ModelConfig,
    state: Mapping[str, Tensor],
    directory: Path,
    tokenizer_files: Iterable[Path] = (),
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the state of a Transformer with resident experts (gathered, if it was sharded)."""
    where = "the model to be saved"
    if "embedding.weight" not in state:
        raise CheckpointError(f"{where}: has no embedding.weight")
    dtype = dtype or state["embedding.weight"].dtype
    files = {path.name: path for path in tokenizer_files}
    with open_writer(directory, config, dtype, files, shard_bytes=shard_bytes) as writer:
        for name, tensor in state.items():
            if not name.startswith("experts."):
                writer.write_dense(where, name, tensor)
        for layer in config.moe_layers():
            writer.write_experts(where, layer, _unstack(config, state, layer))
        writer.finish()


def open_expert_stores(directory: Path, config: ModelConfig) -> dict[str, ExpertStore]:
    """Open the stores of all MoE layers; the caller closes them.

    Raises CheckpointError if one is missing, damaged, or of other shapes than the config tells.
    """
    with ExitStack() as opened:
        stores = {
            layer: opened.enter_context(_open_layer(directory / expert_file(layer), layer, config))
            for layer in config.moe_layers()
        }
        opened.pop_all()
    return stores


def check_directory(directory: Path) -> None:
    """Raise CheckpointError unless the directory exists, can be listed, and holds something."""
    if not directory.exists():
        partial, replaced = partial_path(directory), replaced_path(directory)
        hint = ""
        if partial.exists():
            hint += f"; {partial.name} is an unfinished conversion: run it again"
        if replaced.exists():
            hint += f"; {replaced.name} is the older model, which it was about to replace"
        raise CheckpointError(f"{directory}: does not exist{hint}")
    with translated(directory, "listed"):
        is_empty = not any(directory.iterdir())
    if is_empty:
        raise CheckpointError(f"{directory}: is empty; expected the files of a model")


def find_tokenizer_files(directory: Path) -> dict[str, Path]:
    """The tokenizer files of a directory, native or released, by name."""
    paths = (directory / name for name in TOKENIZER_FILES)
    return {path.name: path for path in paths if path.exists()}


def _open_layer(path: Path, layer: str, config: ModelConfig) -> ExpertStore:
    with translated(path, "opened"):
        store = open_store(path)
    try:
        check_store(store, layer, config)
    except CheckpointError:
        store.close()
        raise
    return store


def _collect(
    where: str, shapes: Mapping[str, Shape], dense: Dense, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All dense tensors, converted; strict."""
    state: dict[str, Tensor] = {}
    for name, tensor in dense:
        if name not in shapes:
            raise CheckpointError(f"{where}: the model has no tensor {name}")
        check_tensor(where, name, tensor, shapes[name])
        state[name] = convert_tensor(where, name, tensor, stored_dtype(name, dtype))
    if missing := [name for name in shapes if name not in state]:
        raise CheckpointError(
            f"{where}: {len(missing)} tensors are missing, first {missing[0]} "
            f"{list(shapes[missing[0]])}"
        )
    return state


def _stack(
    where: str, config: ModelConfig, experts: Iterable[Mapping[str, Tensor]], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The experts of one layer, stacked."""
    shapes = config.expert_shapes()
    stacked = {
        key: torch.empty(config.num_experts, *shape, dtype=dtype) for key, shape in shapes.items()
    }
    count = 0
    for count, tensors in enumerate(experts, 1):
        if count > config.num_experts:
            break
        check_expert(f"{where} expert {count - 1}", tensors, shapes)
        for key, tensor in tensors.items():
            stacked[key][count - 1] = convert_tensor(where, key, tensor, dtype)
    if count != config.num_experts:
        raise CheckpointError(f"{where} has {count} experts, expected {config.num_experts}")
    return stacked


def _unstack(
    config: ModelConfig, state: Mapping[str, Tensor], layer: str
) -> Iterator[dict[str, Tensor]]:
    prefix = f"experts.layers.{layer}."
    tensors = {key: state.get(prefix + key) for key in config.expert_shapes()}
    if missing := [key for key, tensor in tensors.items() if tensor is None]:
        raise CheckpointError(f"the model to be saved: has no {prefix}{missing[0]}")
    stacked = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    for expert in range(config.num_experts):
        yield {key: tensor[expert] for key, tensor in stacked.items()}
