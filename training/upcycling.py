"""From a dense model to a mixture of experts: clones of each feed-forward, and a router.

Source: CPM-2 (arXiv:2106.10715) s2.3 for undisturbed clones, routed once by orthogonal centroids;
sparse upcycling (arXiv:2212.05055); drop-upcycling (arXiv:2502.19261) for experts redrawn in part.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.errors import ConfigError

RouterStart = Literal["orthogonal", "normal"]
State = Mapping[str, Tensor]
CENTROID_GAIN = 0.01  # CPM-2
ROUTER_STD = 0.02  # Megatron, drop-upcycling, AquilaMoE
HALF_GATE = 2.0  # a sigmoid of small scores is 1/2


@dataclass(frozen=True, slots=True, kw_only=True)
class Upcycling:
    """How clones become experts.

    `drop` is the share of each expert's channels that is drawn anew, with the mean and deviation of
    what it replaces; `noise` is added to matrices, in shares of their deviation.
    """

    router_start: RouterStart = "orthogonal"
    drop: float = 0.0
    noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ConfigError(f"drop is {self.drop!r}; allowed: 0 to 1, a share of the channels")
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise is {self.noise!r}; it must be 0 or more, and finite")

    def is_exact(self, config: ModelConfig) -> bool:
        """Whether the mixture computes the dense function: one expert per token, no gate."""
        return not self.drop and not self.noise and config.router != "base_layer"


def upcycle(
    state: State, target: ModelConfig, options: Upcycling, generator: torch.Generator
) -> dict[str, Tensor]:
    """The state of a mixture of experts that begins as copies of the dense feed-forwards.

    Tokens go to one expert, whose output no gate multiplies; only the router base_layer has one,
    which begins near 1/2, so there `wo` is doubled.
    """
    sparse = {name: tensor for name, tensor in state.items() if ".feed_forward." not in name}
    for layer in target.moe_layers():
        stack, index = layer.split("-")
        prefix = f"{stack}.layers.{index}."
        sparse[f"{prefix}moe.centroids"] = _draw_centroids(target, options, generator).to(
            state["embedding.weight"].dtype
        )
        if target.router == "cpm_2":
            sparse[f"{prefix}moe.router_norm"] = torch.ones_like(state["encoder.norm.weight"])
        experts = [
            _make_expert(_dense_layer(state, prefix, target), options, generator)
            for _ in range(target.num_experts)
        ]
        for key in target.expert_shapes():
            sparse[f"experts.layers.{layer}.{key}"] = torch.stack([e[key] for e in experts])
    return sparse


def _dense_layer(state: State, prefix: str, target: ModelConfig) -> dict[str, Tensor]:
    tensors = {key: state[f"{prefix}feed_forward.{key}.weight"] for key in target.expert_shapes()}
    if target.router == "base_layer":
        tensors["wo"] = tensors["wo"] * HALF_GATE
    return tensors


def _draw_centroids(target: ModelConfig, options: Upcycling, generator: torch.Generator) -> Tensor:
    centroids = torch.empty(target.num_experts, target.d_model)
    if options.router_start == "orthogonal":
        return nn.init.orthogonal_(centroids, gain=CENTROID_GAIN, generator=generator)
    return centroids.normal_(0.0, ROUTER_STD, generator=generator)


def _make_expert(
    dense: Mapping[str, Tensor], options: Upcycling, generator: torch.Generator
) -> dict[str, Tensor]:
    """One clone, redrawn in part or with noise; the channels dropped are those of all matrices."""
    expert = {key: tensor.clone() for key, tensor in dense.items()}
    num_channels = len(expert["wi_0"])
    order = torch.randperm(num_channels, generator=generator)
    dropped = order[: round(options.drop * num_channels)]
    for key, tensor in expert.items():
        if key == "norm":
            continue
        rows = tensor.T if key == "wo" else tensor  # one row a channel; a view either way
        if options.noise:
            scale = options.noise * float(tensor.float().std())
            rows += (torch.randn(rows.shape, generator=generator) * scale).to(rows.dtype)
        if len(dropped):
            old = rows[dropped].float()
            drawn = torch.randn(old.shape, generator=generator)
            rows[dropped] = (old.mean() + old.std() * drawn).to(rows.dtype)
    return expert
