"""Optimisers and learning-rate schedules."""

import math

import torch
from torch import nn

from training.recipe import TrainRecipe


def build_optimizer(model: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    """AdamW, or Adafactor, which scales by each parameter's size; norms do not decay."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    is_norm = [name.endswith(("norm", "norm.weight")) for name, _ in trained]
    matrices = [p for (_, p), norm in zip(trained, is_norm, strict=True) if not norm]
    norms = [p for (_, p), norm in zip(trained, is_norm, strict=True) if norm]
    groups = [
        {"params": matrices, "weight_decay": recipe.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    if recipe.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=recipe.learning_rate)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), eps=1e-8)


def learning_rate(step: int, recipe: TrainRecipe) -> float:
    """Learning rate of a step, counted from 0.

    All schedules rise linearly over the warm-up. Then constant stays; linear falls to 0 at the end;
    wsd (warm-up, stable, decay) stays and falls to 0 over the last `decay` share; noam falls as
    base / sqrt(step), so that `learning_rate` is the base, not the peak.

    Source: noam as CPM-2 trains with it; WSD: MiniCPM (arXiv:2404.06395).
    """
    warmup = max(round(recipe.steps * recipe.warmup), 1)
    done = step + 1
    if recipe.schedule == "noam":
        return recipe.learning_rate * min(1 / math.sqrt(done), done / warmup / math.sqrt(warmup))
    rise = min(done / warmup, 1.0)
    left = (recipe.steps - step) / recipe.steps
    if recipe.schedule == "linear":
        rise = min(rise, left / max(1 - warmup / recipe.steps, 1e-9))
    elif recipe.schedule == "wsd" and recipe.decay > 0:
        rise = min(rise, left / recipe.decay)
    return recipe.learning_rate * rise
