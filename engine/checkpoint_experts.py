"""What an expert is in a store of a native directory: its layout, its tensors, its weights."""

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.checkpoint_tensors import (
    DTYPE_NAMES,
    DTYPES,
    Blob,
    Shape,
    blob_tensors,
    check_tensor,
    convert_tensor,
    raw_bytes,
)
from engine.config import ModelConfig
from engine.errors import CheckpointError, ConfigError
from engine.model.layers import FeedForwardWeights, Matrix
from engine.model.quantized import Int4Matrix, Int8Matrix
from engine.quantize import SCALE, quantize_matrices, stored_tensors
from offload.layout import BlobLayout, Quantization, make_layout
from offload.store import ExpertStore

BIASES = ("bi_0", "bi_1", "bo")


def expert_layout(
    config: ModelConfig, dtype: torch.dtype, quantization: Quantization = "none"
) -> BlobLayout:
    """How an expert of the model lies in a blob; `dtype` is that of the norm if it is quantised.

    Raises ConfigError if experts of these sizes cannot be quantised.
    """
    name = DTYPE_NAMES[dtype]
    if quantization == "none":
        return make_layout({key: (name, shape) for key, shape in config.expert_shapes().items()})
    return make_layout(stored_tensors(config, name, quantization), quantization)


def expert_bytes(
    where: str,
    tensors: Mapping[str, Tensor],
    config: ModelConfig,
    dtype: torch.dtype,
    quantization: Quantization = "none",
) -> dict[str, NDArray[np.uint8]]:
    """What is stored of an expert; `where` names its origin in errors.

    Raises CheckpointError if the tensors are not those of one expert, or cannot be stored so.
    """
    check_expert(where, tensors, config.expert_shapes())
    if quantization == "none":
        names = config.expert_shapes().keys()
        stored = {key: convert_tensor(where, key, tensors[key], dtype) for key in names}
    else:
        vectors = [name for name, part in tensors.items() if part.ndim == 1]
        stored = {name: convert_tensor(where, name, tensors[name], dtype) for name in vectors}
        try:
            stored.update(quantize_matrices(tensors, config, quantization))
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
    return {key: raw_bytes(part) for key, part in stored.items()}


def expert_weights(blob: Blob, layout: BlobLayout) -> FeedForwardWeights:
    """The weights of one expert as views of its blob."""
    tensors = blob_tensors(blob, layout)
    return FeedForwardWeights(
        norm=tensors.get("norm"),
        wi_0=_matrix(tensors, "wi_0", layout),
        wi_1=_matrix(tensors, "wi_1", layout) if "wi_1" in tensors else None,
        wo=_matrix(tensors, "wo", layout),
        **{name: tensors[name] for name in BIASES if name in tensors},
    )


def float_tensors(blob: Blob, layout: BlobLayout) -> dict[str, Tensor]:
    """The tensors of one expert, dequantised if need be to `layout_dtype`, else as views."""
    weights = expert_weights(blob, layout)._asdict()
    dtype = DTYPES[layout_dtype(layout)]
    return {
        name: part if isinstance(part, Tensor) else part.dequantize(dtype)
        for name, part in weights.items()
        if part is not None
    }


def _matrix(tensors: Mapping[str, Tensor], name: str, layout: BlobLayout) -> Matrix:
    if layout.quantization == "none":
        return tensors[name]
    scale = tensors[name + SCALE[layout.quantization]]
    kind = Int8Matrix if layout.quantization == "int8" else Int4Matrix
    return kind(tensors[name], scale)


def layout_dtype(layout: BlobLayout) -> str:
    """The dtype that experts are computed in: that of vectors, which are never quantised.

    Quantised experts without vectors are computed in bf16, which their scales are stored in.
    """
    scale = SCALE.get(layout.quantization, "")
    plain = (spec for spec in layout.tensors if not scale or not spec.name.endswith(scale))
    vectors = [spec.dtype for spec in plain if not scale or len(spec.shape) == 1]
    return vectors[0] if vectors else "BF16"


def check_store(store: ExpertStore, layer: str, config: ModelConfig) -> None:
    """Raise CheckpointError unless a store holds the experts of that layer of the model."""
    layout = store.layout
    dtype = layout_dtype(layout)
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{store.path}: experts are {dtype}, expected one of {', '.join(DTYPES)}"
        )
    try:
        expected = expert_layout(config, DTYPES[dtype], layout.quantization)
    except ConfigError as error:
        raise CheckpointError(f"{store.path}: {error}") from error
    found = (store.layer, store.num_experts, _kinds(layout))
    told = (layer, config.num_experts, _kinds(expected))
    if found != told or layout != expected:
        raise CheckpointError(f"{store.path}: holds {found}, the config tells of {told}")


def _kinds(layout: BlobLayout) -> dict[str, tuple[str, Shape]]:
    return {spec.name: (spec.dtype, spec.shape) for spec in layout.tensors}


def check_expert(where: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless the tensors are those of one expert."""
    if wrong := sorted(tensors.keys() ^ shapes.keys()):
        state = "missing" if wrong[0] in shapes else "not of this model"
        raise CheckpointError(f"{where}: tensor {wrong[0]} is {state}")
    for key, shape in shapes.items():
        check_tensor(where, key, tensors[key], shape)
