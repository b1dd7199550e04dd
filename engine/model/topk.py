"""MoE layers in which each token goes to its k best experts, weighed by their gates.

Shape letters: N tokens, D model width, E experts, K experts of a token, P = N * K pairs, G groups.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.layers import FeedForwardWeights, Linear, feed_forward, make_norm
from engine.model.moe import ExpertSource, MoELayer, run_experts
from engine.model.tiles import in_tiles, in_vectors


class Routes(NamedTuple):
    """The experts (N, K) of each token, by rising id, and their gates (N, K) in fp32."""

    experts: Tensor
    gates: Tensor


class TopKLayer(nn.Module):
    """y = x + sum over the chosen experts of gate * FF_e(norm(x)), plus the shared expert's FF.

    softmax: gates are those of a softmax over all experts (Mixtral, Qwen-MoE, OLMoE, DeepSeek-V2,
    gpt-oss, Switch); sigmoid: a sigmoid each (DeepSeek-V3); sparsemixer: Phi-MoE's two masked
    softmaxes. `ModelConfig` tells of groups, biases and scales.

    Source: Mixtral (arXiv:2401.04088); DeepSeekMoE (arXiv:2401.06066); DeepSeek-V3
    (arXiv:2412.19437) s2.1; SparseMixer (arXiv:2310.00811).
    """

    tile_rows = 0

    def __init__(self, config: ModelConfig, name: str) -> None:
        super().__init__()
        self.config = config
        self.name = name
        self.norm = make_norm(config)
        self.router = nn.Linear(config.d_model, config.num_experts, bias=config.router_bias)
        if config.choice_bias:
            self.choice_bias = nn.Parameter(torch.zeros(config.num_experts))
        if config.shared_d_ff:
            self.shared = SharedExpert(config)
        if config.shared_gate:
            self.shared_gate = nn.Linear(config.d_model, 1, bias=False)

    def choose(self, x_ND: Tensor) -> Tensor:
        """The experts that tokens, as they come to this layer, will want: ids, flat (P,)."""
        return self.route(self.norm(x_ND)).experts.flatten()

    def scores(self, normed_ND: Tensor) -> Tensor:
        """Scores (N, E) of normed tokens; in fp32, whatever the model is in."""
        weight, bias = self.router.weight, self.router.bias
        with torch.autocast(normed_ND.device.type, enabled=False):

            def product(x: Tensor) -> Tensor:
                return F.linear(x, weight.float(), None if bias is None else bias.float())

            if self.tile_rows:
                return in_tiles(product, normed_ND.float(), self.tile_rows)
            return product(normed_ND.float())

    def route(self, normed_ND: Tensor) -> Routes:
        """Choose experts and weigh them."""
        config, scores_NE = self.config, self.scores(normed_ND)
        if config.router == "sparsemixer":
            return _sorted(*sparse_mixer(scores_NE, config))
        if config.router == "softmax":
            gates_NE = scores_NE.softmax(-1)
        else:
            gates_NE = in_vectors(torch.sigmoid, scores_NE)
        choice_NE = gates_NE + self.choice_bias.float() if config.choice_bias else gates_NE
        if config.expert_groups > 1:
            choice_NE = within_groups(choice_NE, config)
        experts_NK = choice_NE.topk(config.num_experts_per_token, sorted=False).indices
        gates_NK = gates_NE.gather(1, experts_NK)
        if config.normalize_gates:
            total_N1 = gates_NK.sum(-1, keepdim=True)
            gates_NK = gates_NK / (total_N1 if config.router == "softmax" else total_N1 + 1e-20)
        return _sorted(experts_NK, gates_NK * config.routed_scale)

    def forward(self, x: Tensor, experts: ExpertSource) -> Tensor:
        """Map (..., D) to (..., D).

        Tokens are routed one by one, whatever the leading dimensions.
        """
        x_ND = x.flatten(0, -2)
        normed_ND = self.norm(x_ND)
        routes = self.route(normed_ND)
        size = self.config.num_experts_per_token
        experts.foresee(self.name, x_ND)
        pairs_PD = self.compute(normed_ND, routes.experts.flatten(), experts)
        update_NKD = pairs_PD.view(-1, size, x_ND.shape[1])
        gates_NK1 = routes.gates.unsqueeze(-1)  # fp32: equal experts sum to what one of them gives
        sum_ND = update_NKD[:, 0] * gates_NK1[:, 0]
        for index in range(1, size):  # by rising id, whichever came first
            sum_ND = sum_ND + update_NKD[:, index] * gates_NK1[:, index]
        update_ND = sum_ND.to(x.dtype)
        if self.config.shared_d_ff:
            update_ND = update_ND + self._shared(normed_ND)
        return x + update_ND.view_as(x)

    def compute(self, normed_ND: Tensor, expert_P: Tensor, experts: ExpertSource) -> Tensor:
        """The output of the expert of each pair, (P, D): those that are wanted are borrowed once.

        Gradients may flow if the weights stay where they are, as those of ResidentExperts do.
        """
        return run_experts(self.name, normed_ND, expert_P, experts, self.config, self.tile_rows)

    def _shared(self, normed_ND: Tensor) -> Tensor:
        out_ND: Tensor = self.shared(normed_ND, self.tile_rows)
        if not self.config.shared_gate:
            return out_ND
        weight = self.shared_gate.weight
        if not self.tile_rows:
            return out_ND * F.linear(normed_ND, weight).sigmoid()
        gate_N1 = in_tiles(lambda tile: F.linear(tile, weight), normed_ND, self.tile_rows)
        return out_ND * in_vectors(torch.sigmoid, gate_N1)


class SharedExpert(nn.Module):
    """The expert that every token goes through."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.wi_0 = Linear(config.d_model, config.shared_d_ff)
        if config.gated:
            self.wi_1 = Linear(config.d_model, config.shared_d_ff)
        self.wo = Linear(config.shared_d_ff, config.d_model)

    def forward(self, normed_ND: Tensor, tile_rows: int) -> Tensor:
        """Map normed tokens (N, D) to (N, D)."""
        gate = self.wi_1.weight if self.config.gated else None
        weights = FeedForwardWeights(None, self.wi_0.weight, gate, self.wo.weight)
        return feed_forward(normed_ND, weights, self.config, tile_rows)


def within_groups(choice_NE: Tensor, config: ModelConfig) -> Tensor:
    """Scores for choosing, where only experts of the best groups may be chosen.

    A group is as good as its best expert, or the sum of its two best.
    """
    grouped_NGe = torch.unflatten(choice_NE, 1, (config.expert_groups, -1))
    if config.group_score == "best":
        score_NG = grouped_NGe.amax(-1)
    else:
        score_NG = grouped_NGe.topk(2, -1).values.sum(-1)
    best = score_NG.topk(config.top_groups, sorted=False).indices
    is_open_NG = torch.zeros_like(score_NG, dtype=torch.bool).scatter_(1, best, value=True)
    return grouped_NGe.masked_fill(~is_open_NG.unsqueeze(-1), -torch.inf).flatten(1)


def sparse_mixer(scores_NE: Tensor, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Phi-MoE's choice without noise: each of the k experts by a softmax over those near the best.

    An expert is near if the best exceeds it by at most 2 * router_jitter of the larger magnitude.
    """
    experts, gates = [], []
    left_NE = scores_NE
    for _ in range(config.num_experts_per_token):
        best_N1, expert_N1 = left_NE.max(-1, keepdim=True)
        factor_NE = torch.maximum(scores_NE.abs(), best_N1)
        is_far_NE = (best_N1 - scores_NE) / factor_NE > 2 * config.router_jitter
        gates_NE = left_NE.masked_fill(is_far_NE, -torch.inf).softmax(-1)
        experts.append(expert_N1)
        gates.append(gates_NE.gather(1, expert_N1))
        left_NE = left_NE.scatter(1, expert_N1, -torch.inf)
    return torch.cat(experts, 1), torch.cat(gates, 1)


def _sorted(experts_NK: Tensor, gates_NK: Tensor) -> Routes:
    experts_NK, order_NK = experts_NK.sort(-1)
    return Routes(experts_NK, gates_NK.gather(1, order_NK))


AnyMoE = MoELayer | TopKLayer
