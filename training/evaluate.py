"""How well a model fills spans, against a baseline that knows only how often each token occurs."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model.transformer import Transformer
from training.shards import Shard
from training.span_corruption import IGNORED, Batch


class FillReport(NamedTuple):
    """Mean negative log-likelihood (nats) and top-1 accuracy over tokens that are no sentinels."""

    loss: float
    accuracy: float
    unigram_loss: float
    unigram_accuracy: float
    tokens: int

    def summary(self, task: str = "span filling") -> str:
        """All of it in a line; `task` names what was asked for."""
        return (
            f"{task}, {self.tokens:,} validation tokens: loss {self.loss:.3f} (perplexity "
            f"{self.perplexity:.0f}), accuracy {self.accuracy:.1%}; unigram baseline: loss "
            f"{self.unigram_loss:.3f} (perplexity {self.unigram_perplexity:.0f}), accuracy "
            f"{self.unigram_accuracy:.1%}"
        )

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def unigram_perplexity(self) -> float:
        """exp(unigram_loss)."""
        return math.exp(self.unigram_loss)


def unigram_log_probs(shards: list[Shard], weights: list[float], vocab_size: int) -> Tensor:
    """Log-probability of each token in the training mix, with one count added to each.

    Returns (V,).
    """
    mixed = np.zeros(vocab_size)
    for shard, weight in zip(shards, weights, strict=True):
        counts = np.bincount(np.asarray(shard.tokens), minlength=vocab_size) + 1.0
        mixed += weight / sum(weights) * counts / counts.sum()
    return torch.from_numpy(np.log(mixed)).float()


@torch.no_grad()
def evaluate_fill(
    model: Transformer, batches: Iterable[Batch], unigram_V: Tensor, special_ids: Iterable[int]
) -> FillReport:
    """Teacher-forced loss of the span tokens; sentinels and other special targets are left out."""
    special = torch.tensor(sorted(special_ids))
    best_unigram = int(unigram_V.argmax())
    sums = torch.zeros(5, dtype=torch.float64)
    was_training = model.training
    model.eval()
    for batch in batches:
        logits_BTV = model(*batch[:4])
        counted = (batch.labels_BT != IGNORED) & ~torch.isin(batch.labels_BT, special)
        labels_N = batch.labels_BT[counted]
        logits_NV = logits_BTV[counted].float()
        sums += torch.tensor(
            [
                F.cross_entropy(logits_NV, labels_N, reduction="sum").item(),
                (logits_NV.argmax(-1) == labels_N).sum().item(),
                -unigram_V[labels_N].sum().item(),
                (labels_N == best_unigram).sum().item(),
                len(labels_N),
            ],
            dtype=torch.float64,
        )
    model.train(was_training)
    if not sums[4]:
        raise ValueError("no span token to evaluate: the validation texts are too short or empty")
    loss, accuracy, unigram_loss, unigram_accuracy = (sums[:4] / sums[4]).tolist()
    return FillReport(loss, accuracy, unigram_loss, unigram_accuracy, int(sums[4]))
