"""A native mixture whose experts are read from the disk each time: slow, in next to no memory."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint import load_model, open_expert_stores
from engine.checkpoint_experts import float_tensors
from engine.config import ModelConfig
from engine.model.layers import FeedForwardWeights
from engine.model.moe import OPTIONAL
from engine.model.transformer import Transformer
from offload.store import ExpertStore


class StoredExperts:
    """An `ExpertSource` that reads each expert when it is wanted, in fp32; nothing is kept."""

    def __init__(self, stores: Mapping[str, ExpertStore]) -> None:
        self._stores = stores

    def foresee(self, layer: str, x_ND: Tensor) -> None:
        """Nothing is read ahead."""

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Read the wanted experts, one after the other."""
        store = self._stores[layer]
        blob = np.empty(store.layout.blob_bytes, np.uint8)
        for expert in wanted:
            tensors = float_tensors(store.read_blob(expert, blob), store.layout)
            own: dict[str, Any] = {name: tensor.float() for name, tensor in tensors.items()}
            yield expert, FeedForwardWeights(**OPTIONAL | own)


@contextmanager
def open_streamed(directory: Path, config: ModelConfig) -> Iterator[Transformer]:
    """A native mixture that computes in fp32, its experts read from the disk again and again."""
    stores = open_expert_stores(directory, config)
    try:
        yield load_model(directory, torch.float32, StoredExperts(stores)).eval()
    finally:
        for store in stores.values():
            store.close()
