"""Products of the rows of short sweeps, one layer at a time.

Shape letters: N rows, I inputs, O outputs, D model width, F feed-forward width.
"""

import torch
from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.builder import Builder
from engine.kernels.team import the_team

MOST_ROWS = 128  # up to which torch, which first brings a matrix into another order, is slower


class RowProducts:
    """Products and dense feed-forwards of few rows. For one thread at a time."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def takes(self, x: Tensor) -> bool:
        """Whether these are few enough rows (..., I), and nothing is to be trained."""
        return 0 < x.numel() <= MOST_ROWS * x.shape[-1] and not torch.is_grad_enabled()

    def linear(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """The product of a layer with (..., I): (..., O) in the dtype of x."""
        x_NI = x.flatten(0, -2).float()
        out_NO = torch.empty(len(x_NI), layer.out_features)
        builder = Builder(self._config, layer.weight.dtype, is_exact=False)
        builder.linear(x_NI.contiguous(), layer, out_NO)
        self._run(builder, len(x_NI))
        return out_NO.to(x.dtype).view(*x.shape[:-1], -1)

    def feed_forward(
        self, x: Tensor, norm: nn.Module, wi_0: nn.Linear, wi_1: nn.Linear | None, wo: nn.Linear
    ) -> Tensor:
        """FF(norm(x)) of (..., D), in the dtype of x."""
        x_ND = x.flatten(0, -2).float().contiguous()
        hidden_NF, gate_NF = (torch.empty(len(x_ND), wi_0.out_features) for _ in range(2))
        out_ND = torch.empty_like(x_ND)
        builder = Builder(self._config, wi_0.weight.dtype, is_exact=False)
        builder.product(
            x_ND,
            wi_0.weight,
            hidden_NF,
            bias_O=wi_0.bias,
            norm=norm,
            activation=self._config.activation,
            gate=None if wi_1 is None else (wi_1.weight, wi_1.bias, gate_NF),
        )
        builder.linear(hidden_NF, wo, out_ND)
        self._run(builder, len(x_ND))
        return out_ND.to(x.dtype).view_as(x)

    def _run(self, builder: Builder, rows: int) -> None:
        the_team().run(builder.table(), rows, builder.scratch_bytes(rows))
