"""Models with random weights: the start of training, and of tests."""

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.model.transformer import Transformer


def num_parameters(model: nn.Module) -> int:
    """Number of parameters, shared ones counted once; works on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters())


def random_weight(
    name: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    generator: torch.Generator,
    centroid_gain: float = 0.01,
) -> Tensor:
    """A random start for the parameter of that name: T5's scales, orthogonal centroids, norms of 1.

    Without the 1/sqrt(K) scale in attention, queries start smaller by that factor.
    Source: T5 (mesh-tensorflow) initialisers; CPM-2's orthogonal 0.01 centroids.
    """
    if name.endswith(("norm", "norm.weight")):
        return torch.ones(shape)
    if name.endswith((".bias", "_bias", "sinks", ".bi_0", ".bi_1", ".bo")):
        return torch.zeros(shape)
    if name.endswith("centroids"):
        return nn.init.orthogonal_(torch.empty(shape), gain=centroid_gain, generator=generator)
    inner = config.num_heads * config.d_kv
    wide = config.d_ff**-0.5
    scales = {"out.weight": inner**-0.5, "wo.weight": wide, ".wo": wide, "embedding.weight": 1.0}
    std = next((scale for end, scale in scales.items() if name.endswith(end)), config.d_model**-0.5)
    weight = torch.empty(shape).normal_(0.0, std, generator=generator)
    if name.endswith("qkv.weight"):
        weight[:inner].mul_(config.d_kv**-0.5)
    elif name.endswith("query.weight"):
        weight.mul_(config.d_kv**-0.5)
    return weight


@torch.no_grad()
def initialize(model: Transformer, seed: int, centroid_gain: float = 0.01) -> None:
    """Fill a model with random weights, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        start = random_weight(name, tuple(weight.shape), model.config, generator, centroid_gain)
        weight.copy_(start)
