"""The mixture-of-experts layer and the seam behind which its experts live.

Shape letters: N tokens, R tokens of one expert, D model width, F feed-forward width, E experts.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.model.layers import FeedForwardWeights, feed_forward, rms_norm
from engine.model.tiles import in_tiles, in_vectors

Assign = Callable[[Tensor], Tensor]

OPTIONAL: dict[str, None] = {"norm": None, "wi_1": None}  # of an expert's weights, if it has none


class ExpertSource(Protocol):
    """Where the weights of experts come from."""

    def foresee(self, layer: str, x_ND: Tensor) -> None:
        """Hear what enters a layer, before its experts are asked for.

        A source may guess from it what the layer after it will want.
        """
        ...

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Yield each wanted expert of a layer ('encoder-0') once, in any order.

        A layer asks by falling number of tokens: the longest computations hide the most reading.

        The weights are borrowed: they are valid until the next item is asked for.
        """
        ...


def assign_greedy(scores_NE: Tensor) -> Tensor:
    """Choose the expert with the highest score for each token.

    The lowest id wins a tie. Returns (N,), int64.

    Source: InfMoE's inference rule; CPM-2 (arXiv:2106.10715) s2.3 balances in training only.
    """
    return scores_NE.argmax(-1)


def count_tokens(expert_N: Tensor, num_experts: int) -> list[int]:
    """Tokens of each expert: the one thing of a step for which the host waits for the device."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=expert_N.device)
    # not bincount, which waits for the device three times
    counts: list[int] = counts_E.scatter_add_(0, expert_N, torch.ones_like(expert_N)).tolist()
    return counts


class MoELayer(nn.Module):
    """Routes each token to one expert and adds that expert's output: y = x + FF_e(norm_e(x)).

    cpm_2: scores are <norm(x), c_j>; default: <x, c_j>; base_layer: as default, and the sublayer's
    share is a = sigmoid(<x, c_e>): y = a * (x + FF) + (1 - a) * x. Centroids are not trained by
    cpm_2 and default (no gradient reaches them): a fixed projection that works as a
    locality-sensitive hash.

    Source: CPM-2 (arXiv:2106.10715) s2.3; BASE layers (arXiv:2103.16716); InfMoE's three variants.
    """

    tile_rows = 0

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.assign: Assign = assign_greedy
        self.router_norm: Tensor
        self.centroids = nn.Parameter(
            torch.empty(config.num_experts, config.d_model),
            requires_grad=config.router == "base_layer",
        )
        if config.router == "cpm_2":
            self.register_buffer("router_norm", torch.ones(config.d_model))

    def choose(self, x_ND: Tensor) -> Tensor:
        """The experts (N,) that tokens, as they come to this layer, will want."""
        return self.assign(self.scores(x_ND))

    def scores(self, x_ND: Tensor) -> Tensor:
        """Affinity of each token to each expert, (N, E); in fp32, whatever the model is in."""
        if self.config.router == "cpm_2":
            x_ND = rms_norm(x_ND, self.router_norm, self.config.norm_eps)
        with torch.autocast(x_ND.device.type, enabled=False):
            centroids_DE = self.centroids.float().T
            if self.tile_rows:
                return in_tiles(lambda tile: tile @ centroids_DE, x_ND.float(), self.tile_rows)
            return x_ND.float() @ centroids_DE

    def forward(self, x: Tensor, experts: ExpertSource) -> Tensor:
        """Map (..., D) to (..., D).

        Tokens are routed one by one, whatever the leading dimensions.
        """
        x_ND = x.flatten(0, -2)
        scores_NE = self.scores(x_ND)
        expert_N = self.assign(scores_NE.detach())
        experts.foresee(self.name, x_ND)
        update_ND = self.compute(x_ND, expert_N, experts)
        if self.config.router == "base_layer":
            chosen_N1 = scores_NE.gather(1, expert_N.unsqueeze(1))
            share_N1 = (
                in_vectors(torch.sigmoid, chosen_N1) if self.tile_rows else chosen_N1.sigmoid()
            )
            update_ND = update_ND * share_N1.to(update_ND.dtype)
        return x + update_ND.view_as(x)

    def compute(self, x_ND: Tensor, expert_N: Tensor, experts: ExpertSource) -> Tensor:
        """What the experts add to each token, (N, D): those that are wanted are borrowed once.

        Gradients may flow if the weights stay where they are, as those of ResidentExperts do.
        """
        return run_experts(self.name, x_ND, expert_N, experts, self.config, self.tile_rows)


def run_experts(
    layer: str,
    x_ND: Tensor,
    expert_P: Tensor,
    experts: ExpertSource,
    config: ModelConfig,
    tile_rows: int,
) -> Tensor:
    """The output of the expert of each pair, (P, D); each that is wanted is borrowed once.

    Token n has pairs n * k to n * k + k - 1, where k = P / N.
    """
    if len(x_ND) == 1:
        return _run_for_one(layer, x_ND, expert_P, experts, config, tile_rows)
    per_token = len(expert_P) // max(len(x_ND), 1)
    order_P = expert_P.argsort(stable=True)
    counts_E = count_tokens(expert_P, config.num_experts)
    rows = dict(enumerate(torch.split(order_P, counts_E)))
    wanted = sorted(filter(counts_E.__getitem__, rows), key=lambda expert: -counts_E[expert])
    rows_seen, parts = [], []
    for expert, weights in experts.stream(layer, wanted):
        rows_R = rows[expert]
        tokens_R = rows_R if per_token == 1 else rows_R // per_token
        parts.append(feed_forward(x_ND[tokens_R], weights, config, tile_rows))
        rows_seen.append(rows_R)
    back_P = torch.cat(rows_seen).argsort()  # order of arrival does not change the result
    return torch.cat(parts)[back_P]


def _run_for_one(
    layer: str,
    x_1D: Tensor,
    expert_P: Tensor,
    experts: ExpertSource,
    config: ModelConfig,
    tile_rows: int,
) -> Tensor:
    """The same of one token, whose experts all differ: nothing is to be sorted or picked out."""
    wanted = expert_P.tolist()
    outputs = {
        expert: feed_forward(x_1D, weights, config, tile_rows)
        for expert, weights in experts.stream(layer, sorted(wanted))
    }
    return torch.cat([outputs[expert] for expert in wanted])


class ResidentExperts(nn.Module):
    """All experts as parameters of the module.

    For training, for small models, and the oracle of offloading.

    Per layer the stacked tensors norm (E, D), wi_0 and wi_1 (E, F, D), wo (E, D, F).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for layer in config.moe_layers():
            self.layers[layer] = nn.ParameterDict(
                {
                    name: nn.Parameter(torch.empty(config.num_experts, *shape))
                    for name, shape in config.expert_shapes().items()
                }
            )

    def foresee(self, layer: str, x_ND: Tensor) -> None:
        """Nothing to do: all experts are there."""

    def stream(self, layer: str, wanted: Sequence[int]) -> Iterator[tuple[int, FeedForwardWeights]]:
        """Yield the wanted experts in the order given."""
        tensors = self.layers[layer]
        assert isinstance(tensors, nn.ParameterDict)
        for expert in wanted:
            own = {
                name: tensors[name][expert]
                for name in FeedForwardWeights._fields
                if name in tensors
            }
            yield expert, FeedForwardWeights(**OPTIONAL | own)
