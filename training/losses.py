"""What a step minimises: cross-entropy, what teachers say, and penalties on logits and routers.

Shape letters: N labels or routed tokens, V vocabulary, K kept tokens of a teacher, E experts.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model.transformer import Transformer
from training.recipe import Precision
from training.span_corruption import IGNORED, Batch


class TeacherScores(NamedTuple):
    """Log-probabilities of a teacher at temperature 1, of all tokens or of those in `ids_NK`."""

    logs_NK: Tensor
    ids_NK: Tensor | None = None


def autocast(precision: Precision) -> AbstractContextManager[object]:
    """Mixed precision for the matrix products, or nothing."""
    return torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext()


def label_scores(model: Transformer, batch: Batch, precision: Precision) -> tuple[Tensor, Tensor]:
    """Logits (N, V) in fp32 and labels (N,) of the positions that have a label."""
    with autocast(precision):
        encoded_BSD = model.encode(batch.encoder_BS, batch.encoder_segments_BS)
        hidden_BTD = model.decode(
            batch.decoder_BT, batch.decoder_segments_BT, encoded_BSD, batch.encoder_segments_BS
        )
        counted_BT = batch.labels_BT != IGNORED
        logits_NV = model.logits(hidden_BTD[counted_BT])
    return logits_NV.float(), batch.labels_BT[counted_BT]


def keep_likeliest(logs_NV: Tensor, top_k: int) -> TeacherScores:
    """The `top_k` likeliest tokens of each position, best first; 0 keeps all."""
    if not top_k:
        return TeacherScores(logs_NV)
    logs_NK, ids_NK = logs_NV.topk(min(top_k, logs_NV.shape[1]), dim=-1)
    return TeacherScores(logs_NK, ids_NK)


def inheritance_loss(logits_NV: Tensor, teacher: TeacherScores, temperature: float) -> Tensor:
    """temperature^2 KL(teacher, student), summed over positions.

    What a teacher keeps is made to sum to 1; the other tokens are left out of the sum.
    Source: Qin et al. (arXiv:2105.13880) eq. 2; s4.4 for the likeliest tokens alone.
    """
    student_NV = (logits_NV / temperature).log_softmax(-1)
    if teacher.ids_NK is not None:
        student_NV = student_NV.gather(1, teacher.ids_NK)
    logs_NK = (teacher.logs_NK / temperature).log_softmax(-1)
    return temperature**2 * (logs_NK.exp() * (logs_NK - student_NV)).sum()


def z_penalty(logits_NV: Tensor) -> Tensor:
    """Sum over positions of the squared logarithm of the softmax's normaliser.

    Source: T5X's z-loss.
    """
    return logits_NV.logsumexp(-1).square().sum()


def balance_penalty(scores_NE: Tensor, expert_N: Tensor) -> Tensor:
    """E * sum over experts of (share of the choices) * (mean probability); 1 if all is even.

    Tokens that choose several experts have as many entries in `expert_N`.

    Source: Switch Transformers (arXiv:2101.03961) eq. 4.
    """
    num_experts = scores_NE.shape[1]
    shares_E = F.one_hot(expert_N, num_experts).float().mean(0)
    return num_experts * (shares_E * scores_NE.softmax(-1).mean(0)).sum()


def router_z_penalty(scores_NE: Tensor) -> Tensor:
    """Mean over tokens of the squared logarithm of the router's normaliser.

    Source: ST-MoE (arXiv:2202.08906) eq. 5.
    """
    return scores_NE.logsumexp(-1).square().mean()
