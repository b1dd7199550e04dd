"""Positions that are added to embeddings: learned, or sines and cosines.

Shape letters: B rows, T positions, D model width.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig


class PositionTable(nn.Module):
    """A vector per position; that of position p is row p + `position_offset`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.offset, self.width = config.position_offset, config.d_model
        self.is_learned = config.positions == "learned"
        if self.is_learned:
            rows = config.max_positions + config.position_offset
            self.weight = nn.Parameter(torch.empty(rows, config.d_model))

    def forward(self, position_BT: Tensor) -> Tensor:
        """Vectors (B, T, D)."""
        if self.is_learned:
            return F.embedding(position_BT + self.offset, self.weight)
        return sinusoids(position_BT + self.offset, self.width)


def sinusoids(position_BT: Tensor, width: int) -> Tensor:
    """Sines of all frequencies, then cosines, (B, T, width), fp32.

    Source: Transformer (arXiv:1706.03762) s3.5, in the order of tensor2tensor.
    """
    half = width // 2
    step = -math.log(10000) / (half - 1)
    frequency = torch.exp(torch.arange(half, device=position_BT.device).float() * step)
    angle = position_BT.float().unsqueeze(-1) * frequency
    return F.pad(torch.cat([angle.sin(), angle.cos()], -1), (0, width % 2))
