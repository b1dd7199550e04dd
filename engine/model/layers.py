"""The small parts of a block: norms, products, feed-forward, masks, relative positions.

Shape letters: B batch, S source or key length, T target or query length, N tokens, D model width,
F feed-forward width, H heads, K head width.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from engine.config import ModelConfig
from engine.model.masks import CausalMask
from engine.model.packed import packed_product
from engine.model.quantized import QuantizedMatrix
from engine.model.spans import Span
from engine.model.tiles import in_tiles, in_vectors, quantized_tile_rows

Matrix = Tensor | QuantizedMatrix
Bias = Tensor | CausalMask | list[Span]

CLAMP, CLAMPED_SLOPE = 7.0, 1.702  # of gpt-oss' feed-forward


class FeedForwardWeights(NamedTuple):
    """Weights of one feed-forward.

    Norm (D,), wi_0 and wi_1 (F, D), wo (D, F); wi_1 None: no gate; norm None: x is normed already.
    Biases bi_0 and bi_1 (F,), bo (D,).
    """

    norm: Tensor | None
    wi_0: Matrix
    wi_1: Matrix | None
    wo: Matrix
    bi_0: Tensor | None = None
    bi_1: Tensor | None = None
    bo: Tensor | None = None


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Divide by the root mean square over the last dimension, in fp32, and scale; no mean, no bias.

    Source: RMSNorm (arXiv:1910.07467), as T5 and CPM-2 use it.
    """
    # torch computes it in fp32; given the weight, it would round to bf16 after it, not before
    return F.rms_norm(x, weight_D.shape, None, eps).to(weight_D.dtype) * weight_D


def linear(x: Tensor, weight: Matrix, bias: Tensor | None = None) -> Tensor:
    """Product of x and the transposed matrix, whichever way the matrix is stored."""
    if isinstance(weight, Tensor) and not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    product = packed_product(x, weight) if isinstance(weight, Tensor) else weight.linear(x)
    return product if bias is None else product + bias


def feed_forward(
    x_ND: Tensor, weights: FeedForwardWeights, config: ModelConfig, tile_rows: int = 0
) -> Tensor:
    """Compute FF(norm(x)) without the residual, for a dense block and for an expert alike.

    Returns (N, D); with `tile_rows`, computed in tiles of so many rows.

    The activated branch is wi_0.
    """
    if tile_rows:
        own = tile_rows if isinstance(weights.wo, Tensor) else quantized_tile_rows(tile_rows)
        activate = partial(in_vectors, partial(_activate, config=config))
        compute = partial(_feed_forward, weights=weights, config=config, activate=activate)
        return in_tiles(compute, x_ND, own)
    return _feed_forward(x_ND, weights, config, partial(_activate, config=config))


def _activate(hidden_NF: Tensor, config: ModelConfig) -> Tensor:
    if config.activation == "relu":
        return F.relu(hidden_NF)
    if config.activation == "silu":
        return F.silu(hidden_NF)
    if config.activation == "clamped_swiglu":
        hidden_NF = hidden_NF.clamp(max=CLAMP)
        return hidden_NF * torch.sigmoid(hidden_NF * CLAMPED_SLOPE)
    return F.gelu(hidden_NF, approximate="none" if config.activation == "gelu" else "tanh")


def _feed_forward(
    x_ND: Tensor,
    weights: FeedForwardWeights,
    config: ModelConfig,
    activate: Callable[[Tensor], Tensor],
) -> Tensor:
    if weights.norm is not None:
        x_ND = rms_norm(x_ND, weights.norm, config.norm_eps)
    hidden_NF = activate(linear(x_ND, weights.wi_0, weights.bi_0))
    if weights.wi_1 is not None:
        gate_NF = linear(x_ND, weights.wi_1, weights.bi_1)
        if config.activation == "clamped_swiglu":
            gate_NF = gate_NF.clamp(-CLAMP, CLAMP) + 1
        hidden_NF = hidden_NF * gate_NF
    return linear(hidden_NF, weights.wo, weights.bo)


class Linear(nn.Linear):
    """A product whose weight may be packed (`pack_linears`).

    With `tile_rows` it is computed in tiles of so many rows (`set_invariant`).
    """

    tile_rows = 0

    def __init__(self, inputs: int, outputs: int, bias: bool = False) -> None:
        super().__init__(inputs, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., inputs) to (..., outputs)."""
        if self.tile_rows:
            return in_tiles(lambda tile: linear(tile, self.weight, self.bias), x, self.tile_rows)
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """`rms_norm` with its weight (D,)."""

    def __init__(self, d_model: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        return rms_norm(x, self.weight, self.eps)


def make_norm(config: ModelConfig, width: int = 0) -> nn.Module:
    """The norm of a config over a width, by default d_model."""
    width = width or config.d_model
    if config.norm == "layer":
        return nn.LayerNorm(width, config.norm_eps, bias=config.norm_bias)
    return RMSNorm(width, config.norm_eps)


class FeedForward(nn.Module):
    """The dense feed-forward sublayer: x + FF(norm(x))."""

    tile_rows = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.norm = make_norm(config)
        self.wi_0 = Linear(config.d_model, config.d_ff, config.ff_bias)
        if config.gated:
            self.wi_1 = Linear(config.d_model, config.d_ff, config.ff_bias)
        self.wo = Linear(config.d_ff, config.d_model, config.ff_bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        gate = self.wi_1 if self.config.gated else None
        weights = FeedForwardWeights(
            None,
            self.wi_0.weight,
            gate.weight if gate else None,
            self.wo.weight,
            self.wi_0.bias,
            gate.bias if gate else None,
            self.wo.bias,
        )
        return x + feed_forward(self.norm(x), weights, self.config, self.tile_rows)


class RelativeBias(nn.Module):
    """Learned attention bias per bucket of relative position and head, one for a whole stack."""

    def __init__(self, config: ModelConfig, *, bidirectional: bool) -> None:
        super().__init__()
        self.bidirectional = bidirectional
        self.max_distance = config.relative_max_distance
        self.weight = nn.Parameter(torch.empty(config.relative_buckets, config.num_heads))

    def forward(self, query_pos: Tensor, key_pos_S: Tensor) -> Tensor:
        """Bias (H, T, S) or (B, H, T, S) of query positions (T,) or (B, T), key positions (S,)."""
        relative = key_pos_S - query_pos.unsqueeze(-1)
        buckets = relative_buckets(
            relative, self.weight.shape[0], self.max_distance, bidirectional=self.bidirectional
        )
        return F.embedding(buckets, self.weight).movedim(-1, -3)


def relative_buckets(
    relative: Tensor, num_buckets: int, max_distance: int, *, bidirectional: bool
) -> Tensor:
    """Bucket of key position minus query position.

    Exact for near keys, logarithmic up to max_distance.

    With 32 buckets and distance 128, bidirectional: -8 -> 8, -91 -> 15, 3 -> 19; else -16 -> 16, 5
    -> 0.
    Source: T5 (arXiv:1910.10683) s2.1.
    """
    if bidirectional:
        num_buckets //= 2
        offset = (relative > 0).long() * num_buckets
        distance = relative.abs()
    else:
        offset = torch.zeros_like(relative)
        distance = (-relative).clamp(min=0)
    exact = num_buckets // 2
    span = math.log(max_distance / exact)
    far = torch.log(distance.clamp(min=1).float() / exact) / span * (num_buckets - exact)
    far = (exact + far.long()).clamp(max=num_buckets - 1)
    return offset + torch.where(distance < exact, distance, far)
