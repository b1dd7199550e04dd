import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from training.routing import assign_balanced


def best_balanced_sum(scores: torch.Tensor) -> float:
    """Every balanced assignment, tried one by one."""
    tokens, experts = scores.shape
    capacity = -(-tokens // experts)
    choices = itertools.product(range(experts), repeat=tokens)
    allowed = (c for c in choices if max(map(c.count, c)) <= capacity)
    return max(sum(float(scores[t, e]) for t, e in enumerate(c)) for c in allowed)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), tokens=st.integers(1, 7), experts=st.integers(2, 3))
def test_the_sum_is_near_the_best_and_no_expert_is_over_full(seed, tokens, experts):
    scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
    chosen = assign_balanced(scores)
    assert torch.bincount(chosen, minlength=experts).max() <= -(-tokens // experts)
    got = float(scores.gather(1, chosen.unsqueeze(1)).sum())
    eps = max(float(scores.max() - scores.min()) / 50, 1e-4)
    assert got >= best_balanced_sum(scores) - tokens * eps - 1e-5


def test_many_tokens_that_all_prefer_one_expert_are_spread_evenly():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1000, 8, generator=generator) * 0.01
    scores[:, 3] += 10.0
    counts = torch.bincount(assign_balanced(scores), minlength=8)
    assert counts.tolist() == [125] * 8


def test_equal_and_broken_scores_are_assigned_too():
    assert torch.bincount(assign_balanced(torch.zeros(10, 3)), minlength=3).max() <= 4
    broken = torch.full((6, 2), torch.nan)
    assert torch.bincount(assign_balanced(broken), minlength=2).tolist() == [3, 3]
    assert assign_balanced(torch.zeros(0, 4)).tolist() == []
    assert assign_balanced(torch.zeros(3, 1)).tolist() == [0, 0, 0]
