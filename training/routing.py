"""Which expert takes which token in training: balanced assignment, or greedily as in use."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.model.moe import assign_greedy
from engine.model.topk import TopKLayer
from engine.model.transformer import Transformer

MAX_ROUNDS = 100


def set_routing(model: Transformer, *, balanced: bool) -> None:
    """Route by balanced assignment or, as at inference, greedily.

    Routers that weigh several experts choose by their own rule; a balance loss is for them.
    """
    for layer in model.moe_layers():
        if isinstance(layer, TopKLayer):
            continue
        layer.assign = assign_balanced if balanced else assign_greedy


def assign_balanced(scores_NE: Tensor) -> Tensor:
    """Give each token an expert and no expert more than ceil(N / E) tokens, with a high sum.

    An auction: each free token bids for the expert that it gains most from, by as much as it
    prefers it to its second choice; an expert keeps its highest bidders and its price rises to the
    lowest bid kept. The sum of scores is within N * eps of the best one unless MAX_ROUNDS end it
    first; then the tokens that are still free take the free places, highest score first.

    Returns expert ids (N,), int64.
    Source: BASE layers (arXiv:2103.16716) s3.2, auction of Bertsekas (1992); eps as CPM-2 sets it.
    """
    scores = scores_NE.detach().float().cpu().numpy()
    scores = np.nan_to_num(scores, nan=0.0, posinf=0.0, neginf=0.0)
    num_tokens, num_experts = scores.shape
    if num_tokens == 0 or num_experts == 1:
        return torch.zeros(num_tokens, dtype=torch.int64, device=scores_NE.device)
    capacity = -(-num_tokens // num_experts)
    eps = max(float(scores.max() - scores.min()) / 50, 1e-4)
    prices = np.zeros(num_experts, dtype=np.float32)
    owner = np.full(num_tokens, -1, dtype=np.int64)
    bids = np.zeros(num_tokens, dtype=np.float32)
    for _ in range(MAX_ROUNDS):
        free = np.flatnonzero(owner < 0)
        if not len(free):
            break
        values = scores[free] - prices
        choice = values.argmax(1)
        best = values[np.arange(len(free)), choice]
        values[np.arange(len(free)), choice] = -np.inf
        bids[free] = prices[choice] + best - values.max(1) + eps
        owner[free] = choice
        for expert in np.unique(choice):
            holders = np.flatnonzero(owner == expert)
            if len(holders) < capacity:
                continue
            ranked = holders[np.argsort(-bids[holders], kind="stable")]
            owner[ranked[capacity:]] = -1
            prices[expert] = bids[ranked[capacity - 1]]
    _fill_free_places(scores, owner, capacity)
    return torch.from_numpy(owner).to(scores_NE.device)


def _fill_free_places(scores: NDArray[np.float32], owner: NDArray[np.int64], capacity: int) -> None:
    """Place the tokens that the auction left free, in place."""
    room = capacity - np.bincount(owner[owner >= 0], minlength=scores.shape[1])
    for token in np.flatnonzero(owner < 0):
        expert = int(np.where(room > 0, scores[token], -np.inf).argmax())
        owner[token] = expert
        room[expert] -= 1
