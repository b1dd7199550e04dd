"""Data and single steps of the benchmark of inheritance: windows of bytes, losses, one update.

A row is a window of text, of which the encoder reads the head and the decoder continues. Experts
are chosen as at inference from the start: their router is fixed, so it cannot collapse, and
balanced assignment cost the upcycled model 0.03 and 0.09 nat here, in two seeds. Shape letters: N
tokens, V vocabulary.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from engine.model.transformer import Transformer
from engine.tokenizer import ByteTokenizer
from training.optimizers import build_optimizer
from training.recipe import TrainRecipe
from training.routing import set_routing

VALID_SEED = 20210624  # validation windows are the same for all runs
TEMPERATURE = 2.0  # of distillation, as Qin et al. release it

Ids = NDArray[np.integer[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What all runs share: sizes of a batch in windows and bytes, and when to evaluate."""

    rows: int = 16
    source_length: int = 32
    target_length: int = 96
    warmup_steps: int = 50
    eval_every: int = 25
    eval_rows: int = 160

    @property
    def lengths(self) -> tuple[int, int]:
        """Bytes that the encoder reads, and that the decoder continues."""
        return self.source_length, self.target_length


@dataclass(slots=True)
class Texts:
    """Token ids of the training text, of a small sample of it, and of the held-out text."""

    train: Ids
    valid: Ids
    small_bytes: int = 20_000
    small: Ids = field(init=False)

    def __post_init__(self) -> None:
        pieces = 20  # spread over the whole, so that the sample has all kinds of text
        size = max(self.small_bytes // pieces, 1)
        starts = np.linspace(0, max(len(self.train) - size, 0), pieces).astype(np.int64)
        self.small = np.concatenate([self.train[s : s + size] for s in starts])


def read_texts(folder: Path) -> Texts:
    """Read all of `train/*.txt` and `valid/*.txt`; `<n>` in a line stands for a newline.

    Raises ValueError if there are none.
    """
    parts: list[Ids] = []
    for name in ("train", "valid"):
        files = sorted((folder / name).glob("*.txt"))
        if not files:
            raise ValueError(f"{folder / name}: no text; make it with: infmoe corpus {folder}")
        raw = b"".join(path.read_bytes().replace(b"<n>", b"\n") for path in files)
        parts.append(np.frombuffer(raw, np.uint8).astype(np.int16) + ByteTokenizer.first_byte)
    train, valid = parts
    return Texts(train, valid)


def draw_windows(text: Ids, seed: int, number: int, shape: Shape, rows: int) -> Tensor:
    """Windows (rows, S + T) of a text, the same for the same seed and number.

    Raises ValueError if the text is shorter than a window.
    """
    length = shape.source_length + shape.target_length
    if len(text) < length:
        raise ValueError(f"the text has {len(text)} bytes, a window {length}: give more text")
    rng = np.random.default_rng((seed, number))
    starts = rng.integers(len(text) - length + 1, size=rows)
    windows = text[starts[:, None] + np.arange(length)]
    return torch.from_numpy(windows.astype(np.int64))


def scores(model: Transformer, windows: Tensor, shape: Shape) -> tuple[Tensor, Tensor]:
    """Logits of the continued part of windows, and the ids there, flat over positions."""
    head, tail = windows[:, : shape.source_length], windows[:, shape.source_length :]
    start = torch.full_like(tail[:, :1], model.config.decoder_start_token_id)
    read = torch.cat([start, tail[:, :-1]], dim=1)
    logits_BTV = model(head, torch.ones_like(head), read, torch.ones_like(read))
    return logits_BTV.flatten(0, 1), tail.flatten()


def distillation_loss(
    student_NV: Tensor, teacher_NV: Tensor, labels_N: Tensor, share: float
) -> Tensor:
    """Cross-entropy, and the share of it that the teacher's distribution takes over.

    Source: Qin et al. (arXiv:2105.13880) s3: (1 - a) CE + a t^2 KL(teacher || student).
    """
    plain = F.cross_entropy(student_NV, labels_N)
    apart = F.kl_div(
        (student_NV / TEMPERATURE).log_softmax(-1),
        (teacher_NV / TEMPERATURE).log_softmax(-1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - share) * plain + share * TEMPERATURE**2 * apart


def valid_loss(model: Transformer, text: Ids, shape: Shape) -> float:
    """Mean loss over the validation windows; experts are chosen as at inference."""
    model.eval()
    set_routing(model, balanced=False)
    windows = draw_windows(text, VALID_SEED, 0, shape, shape.eval_rows)
    with torch.no_grad():
        sums = [
            float(F.cross_entropy(*scores(model, part, shape), reduction="sum"))
            for part in torch.split(windows, 32)
        ]
    model.train()
    return math.fsum(sums) / (shape.eval_rows * shape.target_length)


def make_optimizer(model: Transformer, rate: float) -> torch.optim.Optimizer:
    """AdamW as the training loop builds it, in one kernel: small models wait for Python else."""
    optimizer = build_optimizer(model, TrainRecipe(steps=1, learning_rate=rate))
    for group in optimizer.param_groups:
        group["fused"] = True
    return optimizer


def update(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    windows: Tensor,
    shape: Shape,
    teacher: Transformer | None,
    share: float,
) -> float:
    """One step; returns the training loss."""
    logits_NV, labels_N = scores(model, windows, shape)
    if teacher is None:
        loss = F.cross_entropy(logits_NV, labels_N)
    else:
        with torch.no_grad():
            taught_NV, _ = scores(teacher, windows, shape)
        loss = distillation_loss(logits_NV, taught_NV, labels_N, share)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())
