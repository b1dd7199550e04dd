"""From a dense model to a mixture of experts: clones of feed-forwards, and routers.

Source: CPM-2 (arXiv:2106.10715) s2.3 for undisturbed clones, routed once by orthogonal centroids;
sparse upcycling (arXiv:2212.05055); drop-upcycling (arXiv:2502.19261) for experts redrawn in part.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.errors import ConfigError

RouterStart = Literal["orthogonal", "normal"]
LayerChoice = Literal["all", "every_second", "upper_half", "encoder", "decoder"]
State = Mapping[str, Tensor]
CENTROID_GAIN = 0.01  # CPM-2
ROUTER_STD = 0.02  # Megatron, drop-upcycling, AquilaMoE
BIASES = {"bi_0": "wi_0.bias", "bi_1": "wi_1.bias", "bo": "wo.bias"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Upcycling:
    """How clones become experts, and in which layers.

    `drop` is the share of each expert's channels that is drawn anew, with the mean and deviation of
    what it replaces; `noise` is added to matrices, in shares of their deviation. `layers`: of those
    that are not chosen the feed-forward stays dense; every_second takes the second, fourth ... of
    each stack (GShard, Switch), unless the target's `dense_layers` tell one by one.
    """

    router_start: RouterStart = "orthogonal"
    drop: float = 0.0
    noise: float = 0.0
    layers: LayerChoice = "all"

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ConfigError(f"drop is {self.drop!r}; allowed: 0 to 1, a share of the channels")
        if not 0 <= self.noise < float("inf"):
            raise ConfigError(f"noise is {self.noise!r}; it must be 0 or more, and finite")

    def is_exact(self, config: ModelConfig) -> bool:
        """Whether the mixture computes the dense function: the gates of a token sum to 1."""
        return not self.drop and not self.noise and keeps_gates(config)

    def choose_layers(self, config: ModelConfig) -> ModelConfig:
        """The target, with those layers left dense that are not chosen.

        Raises ConfigError if the target tells them itself.
        """
        if self.layers == "all":
            return config
        if config.dense_layers:
            raise ConfigError(
                f"layers is {self.layers!r}, and dense_layers are given too; give one of them"
            )
        dense = [layer for layer in config.moe_layers() if not self._chooses(config, layer)]
        return replace(config, dense_layers=tuple(dense))

    def _chooses(self, config: ModelConfig, layer: str) -> bool:
        stack, index = layer.split("-")
        if self.layers == "every_second":
            return int(index) % 2 == 1
        if self.layers == "upper_half":
            count = config.num_encoder_layers if stack == "encoder" else config.num_decoder_layers
            return 2 * int(index) >= count
        return stack == self.layers


def keeps_gates(config: ModelConfig) -> bool:
    """Whether the gates of a token sum to what does not depend on the token."""
    return config.normalize_gates if config.is_top_k else config.router != "base_layer"


def first_gates(config: ModelConfig) -> float:
    """What the gates of a token sum to at first, while all scores are small."""
    if not config.is_top_k:
        return 0.5 if config.router == "base_layer" else 1.0  # a sigmoid is 1/2
    if config.normalize_gates:
        return config.routed_scale
    gate = 1 / config.num_experts if config.router == "softmax" else 0.5
    return config.routed_scale * config.num_experts_per_token * gate


def check_upcycling(source: ModelConfig, target: ModelConfig) -> None:
    """Raise ConfigError if the experts of the target cannot be clones of dense feed-forwards."""
    if not target.moe_layers():
        raise ConfigError("no layer has experts: choose other layers, or fewer dense_layers")
    if target.router == "sparsemixer":
        raise ConfigError("router sparsemixer has no start for clones; choose softmax or sigmoid")
    if target.shared_d_ff or target.expert_width != source.d_ff:
        raise ConfigError(
            f"experts are clones of feed-forwards of width {source.d_ff}: leave expert_d_ff and "
            "shared_d_ff out"
        )
    if target.expert_bias != source.ff_bias:
        raise ConfigError(f"expert_bias must be {source.ff_bias}, as the dense model has it")
    if source.norm != "rms" and not target.is_top_k:
        raise ConfigError(f"experts of router {target.router} have RMS norms; choose softmax")


class UpcycledLayer(NamedTuple):
    """A MoE layer made of a dense feed-forward: what all tokens meet, and the experts, one by one.

    An expert is made when it is drawn from the iterator, so that one at a time is in memory.
    """

    dense: dict[str, Tensor]
    experts: Iterator[dict[str, Tensor]]


def upcycle(
    state: State, target: ModelConfig, options: Upcycling, generator: torch.Generator
) -> dict[str, Tensor]:
    """The state of a mixture of experts that begins as copies of the dense feed-forwards."""
    sparse = dict(state)
    dtype = state["embedding.weight"].dtype
    for layer in target.moe_layers():
        names = [name for name in sparse if name.startswith(feed_forward_prefix(layer))]
        dense = {name: sparse.pop(name) for name in names}
        made = upcycle_layer(layer, dense, target, options, generator, dtype)
        sparse |= made.dense
        experts = list(made.experts)
        for key in target.expert_shapes():
            sparse[f"experts.layers.{layer}.{key}"] = torch.stack([e[key] for e in experts])
    return sparse


def feed_forward_prefix(layer: str) -> str:
    """How names of a dense feed-forward begin: 'decoder-3' -> 'decoder.layers.3.feed_forward.'."""
    stack, index = layer.split("-")
    return f"{stack}.layers.{index}.feed_forward."


def upcycle_layer(
    layer: str,
    feed_forward: State,
    target: ModelConfig,
    options: Upcycling,
    generator: torch.Generator,
    dtype: torch.dtype,
) -> UpcycledLayer:
    """Make a MoE layer of the tensors of a feed-forward; the next layer after its last expert.

    Of cpm_2 and default, tokens go to one expert, whose output no gate multiplies. Elsewhere `wo`
    is divided by what the gates sum to at first: 1 if they are normalised, which makes any number
    of clones exact.
    """
    dense = _name_parts(feed_forward, feed_forward_prefix(layer), target)
    prefix = feed_forward_prefix(layer).replace("feed_forward", "moe")
    router = _draw_router(target, options, generator).to(dtype)
    around: dict[str, Tensor] = {}
    if target.is_top_k:
        around[f"{prefix}router.weight"] = router
        around[f"{prefix}norm.weight"] = dense.pop("norm")
        if "norm_bias" in dense:
            around[f"{prefix}norm.bias"] = dense.pop("norm_bias")
        for name, has in (("router.bias", target.router_bias), ("choice_bias", target.choice_bias)):
            if has:
                around[f"{prefix}{name}"] = torch.zeros(target.num_experts, dtype=dtype)
    else:
        around[f"{prefix}centroids"] = router
    if target.router == "cpm_2":
        around[f"{prefix}router_norm"] = torch.ones(target.d_model, dtype=dtype)
    experts = (_make_expert(dense, options, generator) for _ in range(target.num_experts))
    return UpcycledLayer(around, experts)


def _name_parts(state: State, prefix: str, target: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a feed-forward by the names that they have in an expert."""
    names = {key: f"{prefix}{key}.weight" for key in ("norm", "wi_0", "wi_1", "wo")}
    names |= {key: f"{prefix}{name}" for key, name in BIASES.items()}
    names["norm_bias"] = f"{prefix}norm.bias"
    tensors = {key: state[name] for key, name in names.items() if name in state}
    if (share := first_gates(target)) != 1:
        for key in ("wo", "bo"):
            if key in tensors:
                tensors[key] = tensors[key] / share
    return tensors


def _draw_router(target: ModelConfig, options: Upcycling, generator: torch.Generator) -> Tensor:
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
        if tensor.ndim < 2:
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
