"""Models with random weights of any size, for trying out memory and speed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoint_writer import dense_shapes, open_writer
from engine.config import ModelConfig
from engine.model.initial import random_weight
from offload.layout import Quantization


def write_random_model(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    seed: int = 0,
    on_layer: Callable[[int, int], None] | None = None,
    quantization: Quantization = "none",
) -> None:
    """Write a native directory of random weights; memory is needed for one expert or tensor.

    The same seed gives the same model. `on_layer` is given the layers of experts done and in all.
    Raises CheckpointError if the directory is taken, cannot be written or does not fit the disk,
    ConfigError if experts of these sizes cannot be quantised.
    """
    generator = torch.Generator().manual_seed(seed)
    where = "random weights"

    def experts() -> Iterator[dict[str, Tensor]]:
        for _ in range(config.num_experts):
            yield {
                name: random_weight(f".{name}", shape, config, generator)
                for name, shape in config.expert_shapes().items()
            }

    layers = config.moe_layers()
    with open_writer(directory, config, dtype, {}, quantization=quantization) as writer:
        for name, shape in dense_shapes(config).items():
            writer.write_dense(where, name, random_weight(name, shape, config, generator, 1.0))
        for done, layer in enumerate(layers, 1):
            writer.write_experts(where, layer, experts())
            if on_layer:
                on_layer(done, len(layers))
        writer.finish()
