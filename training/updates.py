"""One update of the weights: what a step's batches minimise, and the teachers' part of it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model.transformer import Transformer
from training.distill import Teaching
from training.distributed import ALONE, Workers
from training.losses import inheritance_loss, label_scores, z_penalty
from training.recipe import Recipe
from training.router_options import router_options
from training.span_corruption import IGNORED, Batch


class Lesson(NamedTuple):
    """What teachers add to a step: how much they count, who they are, number of the first batch."""

    rate: float
    teaching: Teaching


class Update(NamedTuple):
    """A step: loss of the text, gradient norm, divergence from the teachers, all per label."""

    loss: float
    norm: float
    kl: float = 0.0


def train_update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    batches: list[tuple[int, Batch]],
    recipe: Recipe,
    lesson: Lesson | None = None,
    workers: Workers = ALONE,
) -> Update:
    """One update from numbered micro-batches, each worker taking its share of them."""
    mine = workers.share(batches)
    count = sum(int((batch.labels_BT != IGNORED).sum()) for _, batch in mine)
    total = workers.sum(float(count))
    sums = [0.0, 0.0]
    optimizer.zero_grad(set_to_none=True)
    for number, batch in mine:
        # the options stay on in the backward pass, where checkpointed blocks are computed again
        with router_options(model, recipe.train, number) as penalties:
            loss, parts = _batch_loss(model, number, batch, recipe, lesson)
            if penalties:
                labels = int((batch.labels_BT != IGNORED).sum())
                loss = loss + labels * torch.stack(list(penalties.values())).mean()
            scaled = loss / (total / workers.size)  # gradients are averaged over workers
            scaled.backward()  # type: ignore[no-untyped-call]
        sums = [a + b for a, b in zip(sums, parts, strict=True)]
    norm = workers.clip(model, recipe.train.clip)
    loss_sum, kl_sum = (workers.sum(value) for value in sums)
    if math.isfinite(loss_sum) and math.isfinite(norm):
        optimizer.step()
    return Update(loss_sum / total, norm, kl_sum / total)


def _batch_loss(
    model: Transformer, number: int, batch: Batch, recipe: Recipe, lesson: Lesson | None
) -> tuple[Tensor, tuple[float, float]]:
    """What a batch minimises, summed over labels; and its cross-entropy and divergence."""
    settings = recipe.train
    logits_NV, labels_N = label_scores(model, batch, settings.precision)
    loss = cross = F.cross_entropy(logits_NV, labels_N, reduction="sum")
    kl = 0.0
    if lesson is not None and lesson.rate > 0:
        scores = lesson.teaching.scores(batch, number)
        inherited = inheritance_loss(logits_NV, scores, lesson.teaching.recipe.temperature)
        loss = (1 - lesson.rate) * cross + lesson.rate * inherited
        kl = inherited.item()
    if settings.z_loss:
        loss = loss + settings.z_loss * z_penalty(logits_NV)
    return loss, (cross.item(), kl)
